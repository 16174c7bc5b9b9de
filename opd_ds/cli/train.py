"""`opd-ds train` and `opd-ds teach`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from opd_ds.cluster.world import World, planned_world
from opd_ds.config.schema import RunConfig
from opd_ds.errors import UserError

Recipe = Annotated[str | None, typer.Option(help="a shipped recipe, see `opd-ds recipes`")]
Config = Annotated[Path | None, typer.Option(help="your own YAML run config; with --recipe, on top of it")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key.path=value, repeatable")]
Resume = Annotated[str, typer.Option(help="never, auto, or the folder of a checkpoint")]
DoneFile = Annotated[
    Path | None, typer.Option(help="made on every node once all is done; the launcher scripts look for it")
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(help="resume although this key, such as optimizer.lr, has another value now; repeatable"),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="check all that a start checks, print the resolved run, start nothing")
]
Processes = Annotated[
    str | None, typer.Option(help="what --dry-run plans for, as 8 or NODESxPROCESSES; default: those that are started")
]


def _command(only_teach: bool, text: str) -> Callable[..., None]:
    def command(
        recipe: Recipe = None,
        config: Config = None,
        overrides: Overrides = None,
        resume: Resume = "never",
        done_file: DoneFile = None,
        allow_change: AllowChange = None,
        dry_run: DryRun = False,
        processes: Processes = None,
    ) -> None:
        if processes is not None and not dry_run:
            raise UserError(f"--processes {processes}: is for --dry-run; a launcher starts processes, see launchers/")
        if not dry_run:
            from opd_ds.cluster.signals import listen

            listen()  # first of all: a signal that comes while libraries and models load must not be lost
        planned = planned_world(processes) if processes is not None else None
        settings = _load(recipe, config, overrides or [], only_teach=only_teach)
        if dry_run:
            _check(settings, resume, allow_change or [], planned)
        else:
            _start(settings, resume, allow_change or [], done_file)

    command.__doc__ = text
    return command


def _load(recipe: str | None, config: Path | None, overrides: list[str], *, only_teach: bool) -> RunConfig:
    from opd_ds.config.loading import load_config

    settings = load_config(recipe, config, overrides)
    if only_teach and settings.teachers:
        raise UserError(f"{config or recipe}: has no section `teach`; distillations start with `opd-ds train`")
    return settings


def _check(settings: RunConfig, resume: str, allowed: list[str], planned: World | None) -> None:
    from opd_ds.cli.dry_run import describe
    from opd_ds.cluster.world import detect_world
    from opd_ds.runs.resume import Start
    from opd_ds.utils.logging import quiet_libraries

    world = detect_world()
    if world.is_main:
        quiet_libraries()
        typer.echo(describe(settings, planned or world, Start(resume, tuple(allowed))))


def _start(settings: RunConfig, resume: str, allowed: list[str], done_file: Path | None) -> None:
    from opd_ds.api import train as run_training
    from opd_ds.cluster.world import detect_world

    is_first_on_node = detect_world().local_rank == 0  # the run sets variables of a launcher for DeepSpeed
    run_training(settings, resume=resume, allowed=allowed)
    if done_file is not None and is_first_on_node:
        done_file.touch()


train = _command(
    False,
    """Run a config: distil, or learn from rewards where it has a section `teach` (as `opd-ds teach`).

    One process by itself, or one per device under deepspeed, torchrun or srun.
    """,
)
teach = _command(True, "Make a specialist by reinforcement learning from rewards; starts like `opd-ds train`.")
