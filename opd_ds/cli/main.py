"""The `opd-ds` command."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from opd_ds import __version__
from opd_ds.cli.config import app as config_app
from opd_ds.cli.data import app as data_app
from opd_ds.cli.doctor import doctor
from opd_ds.cli.eval import evaluate
from opd_ds.cli.export import export
from opd_ds.cli.inspect import inspect
from opd_ds.cli.launch import launch
from opd_ds.cli.merge import merge
from opd_ds.cli.miniature import app as miniature_app
from opd_ds.cli.models import models
from opd_ds.cli.plan import plan
from opd_ds.cli.recipes import app as recipes_app
from opd_ds.cli.rewards import app as rewards_app
from opd_ds.cli.train import teach, train
from opd_ds.cluster.endings import EndedEarlyError, no_silent_end
from opd_ds.cluster.failures import report_and_exit
from opd_ds.errors import Interrupted
from opd_ds.utils.logging import quiet_notes


class _Commands(TyperGroup):
    """All commands. Typer's own endings are exceptions of other kinds; what these are, a library has raised."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except Interrupted:
            raise
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # rich's, where nobody reads on, as `| head` does
                raise
            raise EndedEarlyError(f"exit({end.code!r}) was called before the command was done") from end
        except EOFError as error:  # typer (0.29) would say nothing but "Aborted!"
            raise EndedEarlyError(f"a file ended too early: {error}") from error


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(miniature_app, name="miniature")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")
app.add_typer(rewards_app, name="rewards")
app.command("eval")(evaluate)
app.command()(doctor)
app.command()(inspect)
app.command("launch")(launch)
app.command()(export)
app.command()(merge)
app.command()(models)
app.command()(plan)
app.command("train")(train)
app.command("teach")(teach)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"opd-ds {__version__}")
        raise typer.Exit


@app.callback()
def common(
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and end")
    ] = False,
) -> None:
    """Teach diffusion models tasks; distil several such teachers into one student."""
    # transformers (5.x) and diffusers (0.42) name the optional packages that they miss as soon as they are imported.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    quiet_notes()
    # The deepspeed launcher puts --local_rank before the sub-command; LOCAL_RANK says the same and is what we read.


def main() -> None:
    """Run the command; see `opd_ds.cluster.failures` for how errors are said."""
    try:
        with no_silent_end():
            app()
    except BaseException as error:
        if isinstance(error, SystemExit) and not isinstance(error, Interrupted):  # typer's own ending
            raise
        report_and_exit(error)
