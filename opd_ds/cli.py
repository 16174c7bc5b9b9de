"""The `opd-ds` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opd_ds.bench.cli import app as bench_app
from opd_ds.data.cli import app as data_app
from opd_ds.doctor.cli import doctor
from opd_ds.errors import Interrupted
from opd_ds.evaluation.cli import evaluate
from opd_ds.export_cli import export
from opd_ds.failures import leave
from opd_ds.merge_cli import merge
from opd_ds.models_cli import models
from opd_ds.plan.cli import plan
from opd_ds.rewards.cli import app as rewards_app
from opd_ds.slurm import launch
from opd_ds.train_cli import teach, train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
miniature = typer.Typer(no_args_is_help=True, help="The embedded world: a tiny SD3 on handwritten digits.")
app.add_typer(miniature, name="miniature")
app.add_typer(data_app, name="data")
app.add_typer(rewards_app, name="rewards")
app.add_typer(bench_app, name="bench")
app.command("eval")(evaluate)
app.command()(doctor)
app.command("launch")(launch)
app.command()(export)
app.command()(merge)
app.command()(models)
app.command()(plan)
app.command("train")(train)
app.command("teach")(teach)


@app.callback()
def common(local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0) -> None:
    """Teach diffusion models tasks; distil several such teachers into one student."""
    # The deepspeed launcher puts --local_rank before the sub-command; LOCAL_RANK says the same and is what we read.


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from opd_ds.loading import recipe_summaries

    for name, line in recipe_summaries().items():
        typer.echo(f"{name:26} {line}")


@miniature.command("build")
def build_miniature(
    output_dir: Annotated[Path, typer.Option(help="where base, teachers and prompts are written")],
    seed: int = 0,
) -> None:
    """Make the miniature world from scratch (about 25 minutes on 2 cores; needs scikit-learn)."""
    from opd_ds.engine import init_group
    from opd_ds.launch import World, prepare_environment
    from opd_ds.miniature.build import build
    from opd_ds.quiet import quiet_libraries

    prepare_environment(World())
    quiet_libraries()
    with init_group(World()) as group:
        build(output_dir, group, seed=seed)


def main() -> None:
    """Run the command; see `opd_ds.failures` for how errors are said."""
    try:
        app()
    except BaseException as error:
        if isinstance(error, SystemExit) and not isinstance(error, Interrupted):  # typer's own ending
            raise
        leave(error)


if __name__ == "__main__":
    main()
