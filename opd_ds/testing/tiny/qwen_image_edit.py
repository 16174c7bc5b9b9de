"""A tiny random Qwen-Image-Edit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import QwenImageEditPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from torch import Tensor

from opd_ds.models.base import ModelFamily
from opd_ds.models.qwen_image import pack, unpack
from opd_ds.testing.tiny import qwen_image
from opd_ds.testing.tiny.parts import references, run

SETTINGS = {"reference_side": 48}


def write(folder: Path, seed: int = 0, kind: Any = QwenImageEditPipeline) -> Path:
    """As `qwen_image.write`, with the processor of pictures that the released models have."""
    from transformers import Qwen2VLImageProcessor

    qwen_image.write(folder, seed, kind)
    Qwen2VLImageProcessor(patch_size=14, temporal_patch_size=2, merge_size=2).save_pretrained(folder / "processor")
    return folder


@contextmanager
def smaller(side: int) -> Iterator[None]:
    """Inside, the pipelines resize pictures to the area of a square of `side` pixels; they have a number for that."""
    whole = pipeline_qwenimage_edit.calculate_dimensions
    with (
        patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda _, ratio: whole(side**2, ratio)),
        patch.object(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", side**2),
    ):
        yield


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
    """As `qwen_image.draw`, each prompt with its reference pictures."""
    rows = []
    guided = {"true_cfg_scale": guidance, "negative_prompt": None if guidance == 1 else family.negative_prompt}
    for prompt, own, packed in zip(prompts, references(family, len(prompts)), pack(noise), strict=True):
        seen = [picture.load() for picture in own]
        asked = {"prompt": prompt, "image": seen if len(seen) > 1 else seen[0], "latents": packed[None]}
        with smaller(family.reference_side or 1024):
            rows.append(run(pipeline, family, steps, pictures=pictures, **asked, **guided).images)
    drawn = torch.cat(rows)
    return drawn if pictures else unpack(drawn, *noise.shape[-2:])
