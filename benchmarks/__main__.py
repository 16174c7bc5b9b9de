"""`python -m benchmarks`, from a checkout: claims, of the paper and of ours, checked by runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Claims, of the paper and of ours, checked by runs."""


@app.command("paper-miniature")
def paper_miniature(
    output_dir: Annotated[Path, typer.Option(help="runs, table.csv, summary.json, README.md and plots go here")],
    quick: Annotated[
        bool, typer.Option("--quick", help="one seed, an eighth of the rounds: shows that it runs, not what is true")
    ] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="how many; default: 3, with --quick 1")] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="jobs at a time, each on one core; default: the cores, at most 4")
    ] = None,
) -> None:
    """Does distilling specialists beat joint and cascaded learning? In the miniature; the same command goes on."""
    from dataclasses import replace

    from benchmarks.paper import bench
    from benchmarks.paper_miniature import FULL, QUICK

    plan = QUICK if quick else FULL
    if seeds is not None:
        plan = replace(plan, seeds=tuple(range(seeds)))
    bench(plan, output_dir, parallel or min(4, os.cpu_count() or 1), typer.echo)


@app.command()
def families(
    output_dir: Annotated[Path, typer.Option(help="families.json, families.md and tiny_runs/ (made anew) go here")],
    family: Annotated[list[str] | None, typer.Option(help="only this one, repeatable; default: all")] = None,
) -> None:
    """Does every model family draw as diffusers does, train under ZeRO-3 and come back? Exit code 1 where one fails."""
    from benchmarks.families import bench_families
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    if not bench_families(output_dir, family or [], typer.echo):
        raise typer.Exit(1)


@app.command("plan")
def plan_memory(
    output_dir: Annotated[Path, typer.Option(help="plan.json, plan.md and one folder per configuration go here")],
    full_size: Annotated[
        bool, typer.Option("--full-size", help="a real model's true width, randomly initialised, instead of 59 M")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="with --full-size: whose, repeatable; default: stable-diffusion-3.5-medium"),
    ] = None,
    lora_layers: Annotated[int, typer.Option(help="with --full-size: of LoRA students, each kind of block")] = 24,
    full_layers: Annotated[int, typer.Option(help="with --full-size: of full-parameter students")] = 24,
) -> None:
    """Is a plan's memory right? Against processes that run it; the same command goes on."""
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import World

    prepare_environment(World())
    from benchmarks.full_size import DEFAULT_MODEL, cases
    from benchmarks.plan_memory import CASES, bench
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    chosen = cases(model or [DEFAULT_MODEL], lora_layers, full_layers) if full_size else CASES
    bench(output_dir, typer.echo, chosen)


@app.command()
def speed(
    output_dir: Annotated[Path, typer.Option(help="speed.json, speed.md, plots and one folder per job go here")],
    size: Annotated[str, typer.Option(help="miniature, 50m or sd35m (GPU only)")] = "miniature",
    world_sizes: Annotated[
        str | None,
        typer.Option(help="ranks, as in 1,2; ratios are of the first; default: 1, 2, 4 as cores or GPUs allow"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="trajectories per task and device; the public code has 3")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="the ratios on one device alone")] = False,
    check: Annotated[
        Path | None, typer.Option(help="an earlier speed.json: exit code 1 where a ratio is less than 0.6 of it")
    ] = None,
) -> None:
    """How much faster than the public loop, on the same work? The same command goes on."""
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import World
    from opd_ds.errors import UserError

    prepare_environment(World())
    from dataclasses import replace

    from benchmarks.speed import speed as measured
    from benchmarks.speed.report import write_report
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    chosen = measured.size_named(size)
    parts = (world_sizes or measured.usual_worlds()).split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--world-sizes {world_sizes}: needs numbers of ranks, as in 1,2,4")
    plan = measured.quick(chosen) if quick else measured.Bench(chosen, worlds=tuple(map(int, parts)))
    found = measured.bench(replace(plan, samples=samples), output_dir, typer.echo)
    write_report(found, output_dir)
    typer.echo(f"table: {output_dir / 'speed.md'}")
    slower = measured.check(found, check) if check else []
    for line in slower:
        typer.echo(f"slower: {line}", err=True)
    if slower:
        raise typer.Exit(1)


@app.command()
def gpu(
    output_dir: Annotated[Path, typer.Option(help="gpu.json, gpu.md, log.txt and pictures go here; made anew")],
    minutes: Annotated[float, typer.Option(min=0.5, help="parts that no longer fit are not run")] = 8.0,
    size: Annotated[
        str | None, typer.Option(help="miniature, 50m or sd35m; default: sd35m, on a CPU miniature")
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help="only this one, repeatable; default: all")] = None,
) -> None:
    """Does it run on this machine's GPU, is it right there, and how fast? Exit code 1 where something is wrong."""
    import torch

    from benchmarks.gpu.parts import PARTS
    from benchmarks.gpu.runner import bench
    from benchmarks.speed.speed import size_named
    from opd_ds.errors import UserError

    names = [known.name for known in PARTS]
    for name in part or []:
        if name not in names:
            raise UserError(f"--part {name}: allowed are {', '.join(names)}")
    chosen = size_named(size or ("sd35m" if torch.cuda.is_available() else "miniature"))
    if chosen.needs_gpu and not torch.cuda.is_available():
        raise UserError(f"--size {chosen.name} needs a GPU; on CPUs: miniature or 50m")
    on_gpu = torch.cuda.is_available()
    parts = [known for known in PARTS if (on_gpu or known.on_cpu) and (not part or known.name in part)]
    patience = 1.0 if on_gpu else 5.0
    if not bench(parts, output_dir, size=chosen.name, minutes=minutes, say=typer.echo, patience=patience):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
