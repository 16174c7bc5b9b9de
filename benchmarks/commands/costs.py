"""Commands that measure memory and time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    world_sizes: Annotated[
        str | None, typer.Option(help="on so many ranks, as in 1,2,4,8, with 41 M parameters; not with --full-size")
    ] = None,
) -> None:
    """Is a plan's memory right? Against processes that run it; the same command continues it."""
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import World

    prepare_environment(World())
    from benchmarks.full_size import DEFAULT_MODEL, cases
    from benchmarks.plan_memory import CASES, at_world_sizes, bench
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    if full_size:
        bench(output_dir, typer.echo, cases(model or [DEFAULT_MODEL], lora_layers, full_layers))
    else:
        bench(output_dir, typer.echo, at_world_sizes(_ranks(world_sizes)) if world_sizes else CASES)


def _ranks(text: str) -> list[int]:
    from opd_ds.errors import UserError

    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--world-sizes {text}: needs numbers of ranks, as in 1,2,4")
    return [int(part) for part in parts]


def fake_world(
    output_dir: Annotated[Path, typer.Option(help="fake_world.json and fake_world.md go here")],
    ranks: Annotated[int, typer.Option(help="of the world that one process plays rank 0 of")] = 512,
) -> None:
    """What does one of hundreds of ranks hold and receive? Counted, beside the formulas."""
    from benchmarks.fake_world import bench

    bench(ranks, output_dir, typer.echo)


def cached_guidance(
    output_dir: Annotated[Path, typer.Option(help="cached_guidance.json and cached_guidance.md go here")],
) -> None:
    """How wrong are states where `rollout.negative_every` saves passes? On the miniature's base."""
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import World

    prepare_environment(World())
    from benchmarks.cached_guidance import bench
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    bench(output_dir, typer.echo)


def kernels(
    output_dir: Annotated[Path, typer.Option(help="kernels.json and kernels.md go here")],
    family: Annotated[list[str] | None, typer.Option(help="repeatable; default: all")] = None,
) -> None:
    """What do kernels of attention and compiled blocks change in each family's velocity and gradient?"""
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import World

    prepare_environment(World())
    from benchmarks.kernels import bench
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    bench(output_dir, family or [], typer.echo)


def optimizers(
    output_dir: Annotated[Path, typer.Option(help="optimizers.json and optimizers.md go here")],
    rounds: Annotated[int, typer.Option(min=4, help="of the miniature, under each")] = 20,
) -> None:
    """What do optimizers with less state than AdamW's learn in some rounds of the miniature?"""
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import World

    prepare_environment(World())
    from benchmarks.optimizers import bench
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    bench(output_dir, rounds, typer.echo)


def growth(
    output_dir: Annotated[Path, typer.Option(help="growth.json, growth.md, growth.png and CSVs go here")],
    prompts: Annotated[int, typer.Option(min=10, help="of the largest prompt set")] = 1_000_000,
) -> None:
    """What grows with prompts, tasks, ranks and resolution, and how fast?"""
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import World

    prepare_environment(World())
    from benchmarks.growth import bench
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    bench(output_dir, prompts, typer.echo)


def loading(
    output_dir: Annotated[Path, typer.Option(help="loading.json, loading.md and one folder per case go here")],
    model: Annotated[
        list[str] | None, typer.Option(help="whose, repeatable; default: SD3.5-M, FLUX.1, Qwen, Wan")
    ] = None,
    ranks: Annotated[str, typer.Option(help="how many processes, as in 1,2")] = "1,2,4,8",
) -> None:
    """What does a rank's host hold while true-width networks are loaded? The same command continues it."""
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import World

    prepare_environment(World())
    from benchmarks.loading import MODELS, bench
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    chosen = {name: MODELS.get(name, 1) for name in model or MODELS}
    bench(output_dir, typer.echo, chosen, [int(count) for count in ranks.split(",")])


def speed(
    output_dir: Annotated[Path, typer.Option(help="speed.json, speed.md, plots and one folder per job go here")],
    size: Annotated[str, typer.Option(help="miniature, 50m or sd35m (GPU only)")] = "miniature",
    world_sizes: Annotated[
        str | None,
        typer.Option(help="ranks, as in 1,2; ratios are of the first; default: 1, 2, 4 as cores or GPUs allow"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="trajectories per task and device; the public code has 3")] = 3,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="public, flow-opd or flow-factory, repeatable: at its batch sizes; default: all"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="the ratios to the public loop on one device alone, no --peer")
    ] = False,
    check: Annotated[
        Path | None, typer.Option(help="an earlier speed.json: exit code 1 where a ratio is less than 0.6 of it")
    ] = None,
) -> None:
    """How much faster than the loops of others, on the same work? The same command continues it."""
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import World

    prepare_environment(World())
    from dataclasses import replace

    from benchmarks.plots import require_plots
    from benchmarks.speed import speed as measured
    from benchmarks.speed.report import write_report
    from opd_ds.errors import UserError
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    require_plots()
    if quick and peer:
        raise UserError("--peer and --quick: --quick has no peers beside the public loop; leave out one of them")
    chosen = measured.size_named(size)
    peers = measured.peers_named(peer)
    worlds = tuple(_ranks(world_sizes or measured.usual_worlds()))
    plan = measured.quick(chosen) if quick else measured.Bench(chosen, worlds=worlds, peers=peers)
    found = measured.bench(replace(plan, samples=samples), output_dir, typer.echo)
    write_report(found, output_dir)
    typer.echo(f"table: {output_dir / 'speed.md'}")
    slower = measured.check(found, check) if check else []
    for line in slower:
        typer.echo(f"slower: {line}", err=True)
    if slower:
        raise typer.Exit(1)


def checkpoint_cost(
    folder: Annotated[Path, typer.Option(help="for checkpoints; removed in the end")],
    millions: Annotated[int, typer.Option(min=1, help="of the student's parameters")] = 50,
    repeats: Annotated[int, typer.Option(min=1, help="saves of each kind, in turns")] = 5,
) -> None:
    """How long does a round wait for its checkpoint, written at once and in the background?"""
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import World

    prepare_environment(World())
    from benchmarks.checkpoint_cost import bench

    bench(millions, folder, repeats)


def quantization(
    output_dir: Annotated[Path, typer.Option(help="quantization.json and quantization.md go here")],
) -> None:
    """Frozen weights in 8 and 4 bits: bytes of the published networks, errors of small ones."""
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()  # torchao speaks when it is imported
    from benchmarks.quantization import bench

    bench(output_dir, typer.echo)


def teacher_ranks(
    output_dir: Annotated[Path, typer.Option(help="teacher_ranks.json, teacher_ranks.md and the runs go here")],
) -> None:
    """What do teachers on ranks of their own gain, measured and as a plan simulates it? They are slowed, on CPUs."""
    from benchmarks.teacher_ranks import bench

    bench(output_dir, typer.echo)


def cost(
    output_dir: Annotated[Path, typer.Option(help="cost.json and cost.md go here")],
    gpu_price: Annotated[
        list[str] | None,
        typer.Option(help="money for one GPU and hour, as H100-80GB=2.5; repeatable; default: assumed, in US dollars"),
    ] = None,
) -> None:
    """GPU hours and money for the paper's run, by model and cluster, as planned and as corrected by measured rounds."""
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import World

    prepare_environment(World())
    from benchmarks.cost import Prices, bench
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    bench(output_dir, typer.echo, Prices.parse(gpu_price or []))
    typer.echo(f"table: {output_dir / 'cost.md'}")
