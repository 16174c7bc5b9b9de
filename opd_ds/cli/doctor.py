"""`opd-ds doctor`."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from opd_ds.cluster.endings import end_now
from opd_ds.cluster.rendezvous import prepare_environment
from opd_ds.cluster.world import detect_world


def doctor(
    recipe: Annotated[str | None, typer.Option(help="a shipped recipe, see `opd-ds recipes`")] = None,
    config: Annotated[Path | None, typer.Option(help="your own YAML run config")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, repeatable")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="the folder to write to; default: the run's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    timeout: Annotated[
        float, typer.Option(min=1, help="seconds for all ranks to arrive, to answer, and to start the process group")
    ] = 120,
) -> None:
    """Say what a node, or a whole allocation, offers a run; exit code 1 when something would stop one."""
    from opd_ds.cluster.rendezvous import agree_on_port
    from opd_ds.config.loading import load_config
    from opd_ds.doctor.examination import Subject, examine
    from opd_ds.doctor.meeting import StoppedError
    from opd_ds.doctor.table import print_report

    world = detect_world()
    if world.size > 1 and world.master_port is None:
        world = replace(world, master_port=agree_on_port(world, timeout))
    prepare_environment(world)
    named = recipe is not None or config is not None
    subject = Subject((lambda: load_config(recipe, config, overrides or [])) if named else None, output_dir)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs there while it starts
            outcome = examine(world, subject, timeout)
    except StoppedError as stopped:
        if stopped.__cause__ is not None:
            typer.echo(f"opd-ds: rank {world.rank}: rank 0 no longer answers; its message says why", err=True)
        raise typer.Exit(1) from None
    report = outcome.report
    if report is not None:
        typer.echo(json.dumps(report.as_dict(), indent=1)) if as_json else print_report(report)
    # The other ranks end well: a launcher ends all ranks at the first that does not, rank 0 in the middle of its table.
    code = 1 if report is not None and report.problems else 0
    if outcome.hangs:
        end_now(code)
    raise typer.Exit(code)
