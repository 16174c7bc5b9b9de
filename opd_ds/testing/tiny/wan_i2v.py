"""A tiny random Wan 2.1 image to video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from opd_ds.models import ModelFamily
from opd_ds.testing.tiny.parts import references, run, save
from opd_ds.testing.tiny.wan import LATENT_CHANNELS, make

_PICTURE_WIDTH = 16
_SIDE = 224  # with patches of 14 pixels 257 states, as of the released encoder


def write(folder: Path, seed: int = 0) -> Path:
    """The pipeline folder; four channels say which latents are given."""
    plain = make(
        seed, in_channels=2 * LATENT_CHANNELS + 4, image_dim=_PICTURE_WIDTH, added_kv_proj_dim=24
    ).components  # fmt: skip
    clip = CLIPVisionConfig(
        hidden_size=_PICTURE_WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=_SIDE,
        patch_size=14,
    )  # fmt: skip
    parts = {name: plain[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    pipeline = WanImageToVideoPipeline(
        **parts,
        image_encoder=CLIPVisionModel(clip),
        image_processor=CLIPImageProcessor(size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE}),
    )
    return save(pipeline, folder)


def draw(pipeline: Any, family: ModelFamily, prompts: list[str], noise: Tensor, guidance: float, steps: int) -> Tensor:
    """Final latents [B, C, f, h, w] of diffusers' pipeline from `noise` of that shape, each prompt with its picture."""
    rows = []
    for prompt, (picture,), start in zip(prompts, references(family, len(prompts)), noise, strict=True):
        asked = {"image": picture.load(), "prompt": [prompt], "latents": start[None], "num_frames": family.frames}
        rows.append(run(pipeline, family, steps, guidance_scale=guidance, **asked).frames)
    return torch.cat(rows)
