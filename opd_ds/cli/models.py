"""`opd-ds models`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def models(as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False) -> None:
    """List the model families: pipeline class, latents, guidance, where a LoRA adapts, a hub id to begin with, and the
    models whose configs `opd-ds plan` has.
    """
    from opd_ds.models import FAMILIES

    known = _known()
    rows = [_row(name) | {"known": known.get(name, [])} for name in FAMILIES]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        passes = f"{row['passes']} pass" + ("es, 1 at guidance 1" if row["passes"] > 1 else "")
        typer.echo(f"{row['family']:20} {row['pipeline']}, for example {row['example']}")
        most = row["reference_pictures"]
        pictures = f"; up to {most} reference pictures" if most > 1 else "; a reference picture" if most else ""
        typer.echo(f"{'':20} latents of {row['latents']}s; {row['guidance']} guidance ({passes}){pictures}")
        typer.echo(f"{'':20} LoRA: {', '.join(row['lora_targets'])}")
        typer.echo(f"{'':20} planned without their files: {', '.join(map(_known_as, row['known']))}")


def _known() -> dict[str, list[dict[str, Any]]]:
    """Models by family; of those that are distilled, in how many steps they are made to be drawn."""
    from opd_ds.plan.network import known_configs, known_models

    found: dict[str, list[dict[str, Any]]] = {}
    for name in known_models():
        configs = known_configs(name)
        entry = {"name": name, "distilled_steps": configs.get("distilled", {}).get("steps")}
        found.setdefault(configs["family"], []).append(entry)
    return found


def _known_as(model: dict[str, Any]) -> str:
    steps = model["distilled_steps"]
    return model["name"] + (f" (distilled, {steps} steps)" if steps else "")


def _row(name: str) -> dict[str, Any]:
    from opd_ds.models import family_class

    family = family_class(name)
    return {
        "family": name,
        "pipeline": family.pipeline_class,
        "latents": "image" if family.default_frames is None else "video",
        "guidance": "embedded" if family.embedded_guidance else "classifier-free",
        "passes": family.passes(4.5),  # at any guidance but 1
        "reference_pictures": family.takes_pictures,  # the most of a prompt
        "lora_targets": list(family.lora_targets),
        "example": family.example,
    }
