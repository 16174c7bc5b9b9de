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

_TEXT_WIDTH, LATENT_CHANNELS = 32, 4


def write(folder: Path, seed: int = 0, *, heads: int = 2) -> Path:
    """The pipeline folder; its scheduler is FlowMatchEuler's, whose steps are those of our `euler`."""
    return save(make(seed, heads=heads), folder)


def make(
    seed: int, boundary: float | None = None, *, patched_vae: bool = False, heads: int = 2, **network: Any
) -> WanPipeline:
    """The pipeline; with a `boundary` one of two networks, with a `patched_vae` as Wan 2.2 TI2V-5B. `network`: further
    settings of the networks.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(TEXTS, 512)
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=_TEXT_WIDTH, d_ff=64, d_kv=8, num_layers=2, num_heads=4,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    networks = [
        WanTransformer3DModel(
            **{"in_channels": LATENT_CHANNELS} | network,
            num_attention_heads=heads,
            attention_head_dim=12,
            out_channels=LATENT_CHANNELS,
            text_dim=_TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=48,
            num_layers=2,
            rope_max_seq_len=64,
        )
        for _ in range(1 if boundary is None else 2)
    ]
    patches = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True, "scale_factor_spatial": 16}
    vae = AutoencoderKLWan(
        **patches if patched_vae else {},
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        num_res_blocks=1,
        latents_mean=[-0.4, 0.1, 0.5, -0.2],
        latents_std=[1.4, 0.8, 2.1, 1.1],
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=networks[0],
        transformer_2=networks[1] if boundary is not None else None,
        boundary_ratio=boundary,
        expand_timesteps=patched_vae,
    )


def draw(pipeline: Any, family: ModelFamily, prompts: list[str], noise: Tensor, guidance: float, steps: int) -> Tensor:
    """Final latents [B, C, f, h, w] of diffusers' pipeline from `noise` of that shape."""
    frames = family.frames
    return run(
        pipeline, family, steps, prompt=prompts, latents=noise, num_frames=frames, guidance_scale=guidance,
        guidance_scale_2=family.low_noise_guidance,
    ).frames  # fmt: skip
