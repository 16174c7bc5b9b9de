"""`opd-ds export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[Path, typer.Argument(help="a folder round-NNNNNN, or a run: its newest checkpoint")],
    out: Annotated[Path, typer.Argument(help="a new folder")],
    ema: Annotated[bool, typer.Option("--ema/--raw", help="averaged weights, or the last")] = True,
    merge: Annotated[bool, typer.Option("--merge", help="add a LoRA to its base and write a whole pipeline")] = False,
    form: Annotated[
        str, typer.Option("--format", help="of a LoRA: diffusers (load_lora_weights reads it) or peft (a PEFT folder)")
    ] = "diffusers",
    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, bf16 or fp16; default: the run's precision, fp32 for a LoRA", show_default=False),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="run config; default: config.yaml of the checkpoint's run")
    ] = None,
) -> None:
    """Write a checkpoint in the form that diffusers loads, with a model card."""
    from opd_ds.api import export_checkpoint
    from opd_ds.config.loading import load_config

    settings = load_config(None, config, []) if config is not None else None
    exported = export_checkpoint(checkpoint, out, settings, averaged=ema, merge=merge, form=form, dtype=dtype)
    typer.echo(f"wrote {out} from {exported.name}")
