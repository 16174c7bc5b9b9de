"""A tiny random Wan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from opd_ds.miniature.networks import make_tokenizer
from opd_ds.models import ModelFamily
from opd_ds.testing.tiny.parts import TEXTS, run, save

_TEXT_WIDTH, _LATENT_CHANNELS = 32, 4


def write(folder: Path, seed: int = 0) -> Path:
    """The pipeline folder; its scheduler is FlowMatchEuler's, whose steps are those of our `euler`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(TEXTS, 512)
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=_TEXT_WIDTH, d_ff=64, d_kv=8, num_layers=2, num_heads=4,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        text_dim=_TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=64,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=_LATENT_CHANNELS,
        num_res_blocks=1,
        latents_mean=[-0.4, 0.1, 0.5, -0.2],
        latents_std=[1.4, 0.8, 2.1, 1.1],
    )
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )
    return save(pipeline, folder)


def draw(pipeline: Any, family: ModelFamily, prompts: list[str], noise: Tensor, guidance: float, steps: int) -> Tensor:
    """Final latents [B, C, f, h, w] of diffusers' pipeline from `noise` of that shape."""
    frames = family.frames
    return run(
        pipeline, family, steps, prompt=prompts, guidance_scale=guidance, latents=noise, num_frames=frames
    ).frames
