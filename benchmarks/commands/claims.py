"""Commands that check claims: the paper's, and that every family is wired right."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def paper_miniature(
    output_dir: Annotated[Path, typer.Option(help="runs, table.csv, summary.json, README.md and plots go here")],
    quick: Annotated[
        bool, typer.Option("--quick", help="one seed, an eighth of the rounds: shows that it runs, not what is true")
    ] = False,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="repeatable; default: 3, 4, 5, which no recipe was tuned on")
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help="methods (always run), queries, noise or further, repeatable; default: all"),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="jobs at a time, each on one core; default: the cores, at most 4")
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(help="a file of what jobs found: those in it are not run again, and those of this run go into it"),
    ] = None,
) -> None:
    """Does distilling specialists beat joint and cascaded learning? In the miniature; the same command continues it."""
    from dataclasses import replace

    from benchmarks.paper.bench import bench
    from benchmarks.paper.plan import FULL, QUICK

    plan = QUICK if quick else FULL
    if seed:
        plan = replace(plan, seeds=tuple(dict.fromkeys(seed)))
    if part:
        plan = plan.with_parts(part)
    bench(plan, output_dir, parallel or min(4, os.cpu_count() or 1), typer.echo, records)


def miniature_table(
    output_dir: Annotated[Path, typer.Option(help="runs, table.json and table.md go here")],
    seeds: Annotated[int, typer.Option(min=1, help="how many")] = 3,
    kind: Annotated[list[str] | None, typer.Option(help="of student, full or lora, repeatable; default: both")] = None,
    processes: Annotated[int, typer.Option(min=1, help="ranks of each run; they change no result")] = 2,
    parallel: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    settings: Annotated[list[str] | None, typer.Option("--set", help="of every run, as in `opd-ds train`")] = None,
) -> None:
    """Does the shipped miniature's student keep each teacher's gain? Over seeds; the same command continues it."""
    from benchmarks.paper.miniature_table import bench

    bench(output_dir, kind or [], seeds, processes, parallel, settings or [], typer.echo)


def passes(
    output_dir: Annotated[Path, typer.Option(help="runs, passes.json, passes.md and passes.png go here")],
    seed: Annotated[int, typer.Option(min=0, help="default: one that no recipe was tuned on")] = 3,
    share: Annotated[float, typer.Option(min=0.01, max=1.0, help="of the rounds; below 1 it shows that it runs")] = 1.0,
    parallel: Annotated[int, typer.Option(min=1, help="runs at a time, each on one core")] = 1,
) -> None:
    """Which reward for how many passes? The public loop's way beside ours; the same command continues it."""
    from benchmarks.passes import bench

    bench(output_dir, seed, share, parallel, typer.echo)


def edit_world(
    output_dir: Annotated[Path, typer.Option(help="base, runs, README.md and grid.png go here")],
    parallel: Annotated[int, typer.Option(min=1, help="jobs at a time, each on one core")] = 2,
    settings: Annotated[list[str] | None, typer.Option("--set", help="of every run, as in `opd-ds train`")] = None,
) -> None:
    """Does one student learn to edit beside drawing? In the miniature that edits; the same command continues it."""
    from benchmarks.edit_world import bench

    bench(output_dir, parallel, settings or [], typer.echo)


def families(
    output_dir: Annotated[
        Path, typer.Option(help="families.json, families.md and tiny_runs/ go here; tiny_runs/ is replaced")
    ],
    family: Annotated[list[str] | None, typer.Option(help="only this one, repeatable; default: all")] = None,
) -> None:
    """Does every model family draw as diffusers does, train under ZeRO-3 and come back? Exit code 1 where one fails."""
    from benchmarks.families import bench_families
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    if not bench_families(output_dir, family or [], typer.echo):
        raise typer.Exit(1)
