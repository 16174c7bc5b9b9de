"""What tiny pipelines have in common."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from opd_ds.models import ModelFamily
from opd_ds.utils.pictures import Picture

# What the tokenizers are trained on.
TEXTS = ["a red 3 on blue", "a green 7 on white", "a blue 0 on red", "the number 5", "a neat 8 beside a black square"]

# The scheduler of FLUX.1-dev and FLUX.2.
DYNAMIC_SHIFT: dict[str, Any] = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}

# A VAE that halves images of 16 x 16 pixels into latents of 4 channels.
VAE_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
}


def painting(number: int, size: tuple[int, int] = (88, 64)) -> Image.Image:
    """An image of `size` (width, height) with large random patches, another for each number."""
    patches = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def references(family: ModelFamily, prompts: int) -> list[tuple[Picture, ...]]:
    """As many reference pictures for each prompt as the family takes, at most two, the second one upright."""
    sizes = ((88, 64), (64, 88))[: family.takes_pictures]

    def picture(number: int, size: tuple[int, int]) -> Picture:
        stream = BytesIO()
        painting(number, size).save(stream, format="png")
        return Picture.find(stream.getvalue(), f"prompt {number}", "picture")

    return [tuple(picture(10 * row + place, size) for place, size in enumerate(sizes)) for row in range(prompts)]


@torch.no_grad()
def save(pipeline: Any, folder: Path) -> Path:
    """Write `pipeline` with random transformers in which no layer is near zero and attention is not near uniform."""
    for network in filter(None, (pipeline.transformer, getattr(pipeline, "transformer_2", None))):
        for parameter in network.parameters():
            # Vectors are norms' weights, which stay near 1, and biases.
            start = parameter if parameter.ndim == 1 else torch.zeros_like(parameter)
            parameter.copy_(start + 0.08 * torch.randn_like(parameter))
    pipeline.save_pretrained(folder)
    return folder


def run(pipeline: Any, family: ModelFamily, steps: int, *, pictures: bool = False, **more: Any) -> Any:
    """What `pipeline` gives with the family's settings: latents, or images [B, 3, H, W]."""
    return pipeline(
        num_inference_steps=steps,
        height=family.height,
        width=family.width,
        max_sequence_length=family.max_text_length,
        output_type="pt" if pictures else "latent",
        **more,
    )
