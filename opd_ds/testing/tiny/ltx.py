"""A tiny random LTX-Video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from opd_ds.miniature.networks import make_tokenizer
from opd_ds.models import ModelFamily
from opd_ds.testing.tiny.parts import TEXTS, run, save

_TEXT_WIDTH, _LATENT_CHANNELS = 32, 8


def write(folder: Path, seed: int = 0, *, timestep_conditioning: bool = False) -> Path:
    """The pipeline folder: 32 by 32 pixels and eight frames a latent, as in the released models."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(TEXTS, 128)
    text = T5Config(
        vocab_size=len(tokenizer), d_model=_TEXT_WIDTH, d_ff=64, d_kv=8, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    transformer = LTXVideoTransformer3DModel(
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=_TEXT_WIDTH,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=_LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=4,
        timestep_conditioning=timestep_conditioning,
        scaling_factor=0.7,
    )
    vae.latents_mean.copy_(torch.linspace(-0.4, 0.5, _LATENT_CHANNELS))
    vae.latents_std.copy_(torch.linspace(0.8, 2.1, _LATENT_CHANNELS))
    pipeline = LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=128, base_shift=0.95, max_shift=2.05,
            shift_terminal=0.1,
        ),
        transformer=transformer,
    )  # fmt: skip
    return save(pipeline, folder)


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
    """What diffusers' pipeline makes of `noise` [B, C, f, h, w]: latents of that shape, or videos [B, F, 3, H, W]."""
    packed = noise.flatten(2).transpose(1, 2)
    drawn = run(
        pipeline, family, steps, pictures=pictures, prompt=prompts, guidance_scale=guidance, latents=packed,
        num_frames=family.frames,
    ).frames  # fmt: skip
    return drawn if pictures else drawn.transpose(1, 2).unflatten(2, noise.shape[2:])
