"""`opd-ds export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[Path, typer.Argument(help="a folder round-NNNNNN of a run")],
    out: Annotated[Path, typer.Argument(help="a new folder")],
    ema: Annotated[
        bool, typer.Option("--ema/--raw", help="averaged weights, where they were kept, or the last")
    ] = True,
    merge: Annotated[bool, typer.Option("--merge", help="add a LoRA to its base and write a whole pipeline")] = False,
    config: Annotated[
        Path | None, typer.Option(help="run config; default: config.yaml of the checkpoint's run")
    ] = None,
) -> None:
    """Write a checkpoint in the form that diffusers loads, with a model card."""
    from opd_ds.checkpoint import read_state
    from opd_ds.checkpoint_export import export_checkpoint
    from opd_ds.loading import load_config
    from opd_ds.quiet import quiet_libraries

    quiet_libraries()
    read_state(checkpoint)
    settings = load_config(None, config or checkpoint.resolve().parents[1] / "config.yaml", [])
    export_checkpoint(settings, checkpoint.resolve(), out, averaged=ema, merge=merge)
    typer.echo(f"wrote {out}")
