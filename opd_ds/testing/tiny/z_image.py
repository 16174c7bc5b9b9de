"""A tiny random Z-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from opd_ds.models import ModelFamily
from opd_ds.testing.tiny.parts import VAE_BLOCKS, run, save
from opd_ds.testing.tiny.qwen_tokenizer import make_tokenizer


def write(folder: Path, seed: int = 0) -> Path:
    """A whole pipeline folder; another seed gives other weights.

    Returns:
        `folder`.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 32, 32],
    )
    vae = AutoencoderKL(
        **VAE_BLOCKS,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    pipeline = ZImagePipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=Qwen3Model(text),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
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
    """What diffusers' pipeline makes of `noise` [B, C, h, w]: latents of that shape, or images [B, 3, H, W]."""
    guided = {"guidance_scale": guidance - 1, "negative_prompt": [""] * len(prompts)}
    copied = list(prompts)  # the pipeline writes into it
    return run(pipeline, family, steps, pictures=pictures, prompt=copied, latents=noise, **guided).images
