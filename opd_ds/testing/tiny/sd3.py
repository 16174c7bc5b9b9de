"""A tiny random Stable Diffusion 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from opd_ds.miniature.networks import Sizes, make_pipeline
from opd_ds.models import ModelFamily
from opd_ds.testing.tiny.parts import run, save

PROMPTS = ["a red 3 on blue", "a green 7 on white", "a blue 0 on red", "the number 5", "a neat 8"]
SIZES = Sizes(layers=2, head_dim=8, text_width=32, vae_channels=(8, 8))


def write(folder: Path, seed: int = 0, sizes: Sizes = SIZES) -> Path:
    """The pipeline folder."""
    pipeline = make_pipeline(PROMPTS, sizes, seed)
    pipeline.vae.register_to_config(scaling_factor=1.3, shift_factor=0.1)
    return save(pipeline, folder)


def draw(pipeline: Any, family: ModelFamily, prompts: list[str], noise: Tensor, guidance: float, steps: int) -> Tensor:
    """Final latents [B, C, h, w] of diffusers' pipeline from `noise` of that shape."""
    return run(pipeline, family, steps, prompt=prompts, guidance_scale=guidance, latents=noise).images
