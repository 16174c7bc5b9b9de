"""`opd-ds merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="a new folder")],
    sources: Annotated[
        list[str], typer.Argument(metavar="NAME_OR_PATH[:WEIGHT]...", help="teachers; default weight: 1/n each")
    ],
    method: Annotated[str, typer.Option(help="linear, ties, dare_ties or dare_linear")] = "linear",
    density: Annotated[
        float | None, typer.Option(help="share of entries that ties and dare keep; default 0.5", show_default=False)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="of a merged LoRA; default: all ranks together", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="the diffusers folder that full checkpoints came from", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="names what dare drops")] = 0,
    majority_sign: Annotated[
        str | None, typer.Option(help="how ties elects signs: total (default) or frequency", show_default=False)
    ] = None,
    family: Annotated[str, typer.Option(help="model family of base and teachers")] = "sd3",
    trust_base: Annotated[bool, typer.Option("--trust-base", help="accept LoRAs that name other bases")] = False,
) -> None:
    """Merge several teachers into one model: a LoRA of LoRAs, a diffusers folder where one is a full checkpoint."""
    from opd_ds.api import merge_weights
    from opd_ds.merge.files import parse_sources
    from opd_ds.merge.merging import Method

    chosen = Method(method, density=density, majority_sign=majority_sign, rank=rank, seed=seed)
    error = merge_weights(out, sources, chosen, base=base, family=family, trust_base=trust_base)
    for teacher in parse_sources(sources):
        typer.echo(f"{teacher.weight:8.3g} x {teacher.name}")
    if error is not None:
        typer.echo(f"relative error of bringing the merged deltas to their rank (Frobenius): {error:.3g}")
    typer.echo(f"wrote {out}")
