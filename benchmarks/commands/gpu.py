"""The command that checks and measures one GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opd_ds.errors import UserError


def gpu(
    output_dir: Annotated[Path, typer.Option(help="gpu.json, gpu.md, log.txt and images go here; replaced")],
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
