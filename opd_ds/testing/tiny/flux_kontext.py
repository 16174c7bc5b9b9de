"""A tiny random FLUX.1 Kontext."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from torch import Tensor

from opd_ds.models.base import ModelFamily
from opd_ds.testing.tiny import flux
from opd_ds.testing.tiny.parts import references, run

SETTINGS = {"reference_side": 48}


def write(folder: Path, seed: int = 0) -> Path:
    return flux.write(folder, seed, kind=FluxKontextPipeline)


def draw(
    pipeline: Any,
    family: ModelFamily,
    prompts: list[str],
    noise: Tensor,
    guidance: float,
    steps: int,
    *,
    pictures: bool = False,
) -> Tensor:
    """As `flux.draw`, each prompt with its reference picture, which is fitted already."""
    rows = []
    for prompt, (reference,), packed in zip(
        prompts, references(family, len(prompts)), pipeline._pack_latents(noise, *noise.shape), strict=True
    ):
        drawn = run(
            pipeline,
            family,
            steps,
            pictures=pictures,
            prompt=[prompt],
            image=family.fit(reference.load()),
            guidance_scale=guidance,
            latents=packed[None],
            max_area=family.height * family.width,
            _auto_resize=False,
        ).images
        rows.append(drawn)
    drawn = torch.cat(rows)
    return drawn if pictures else pipeline._unpack_latents(drawn, family.height, family.width, family.size_unit // 2)
