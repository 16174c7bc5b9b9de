"""A tiny random FLUX.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from opd_ds.miniature.networks import make_tokenizer
from opd_ds.models.base import ModelFamily
from opd_ds.testing.tiny.parts import DYNAMIC_SHIFT, TEXTS, VAE_BLOCKS, run, save

_CLIP_LENGTH, _T5_LENGTH = 16, 32


def write(
    folder: Path, seed: int = 0, *, guidance_embeds: bool = True, heads: int = 2, kind: Any = FluxPipeline
) -> Path:
    """A folder of the pipeline `kind` of FLUX.1-dev's form (schnell's without `guidance_embeds`) with random weights.

    Its own size is 16 x 16 pixels: 4 x 4 patches.
    """
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = make_tokenizer(TEXTS, _CLIP_LENGTH), make_tokenizer(TEXTS, _T5_LENGTH)
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=_CLIP_LENGTH,
        projection_dim=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
    )
    t5 = T5Config(
        vocab_size=len(t5_tokenizer), d_model=24, d_ff=32, d_kv=8, num_layers=1, num_heads=2, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        **VAE_BLOCKS, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    )
    scheduler = FlowMatchEulerDiscreteScheduler(**(DYNAMIC_SHIFT if guidance_embeds else {"shift": 1.0}))
    pipeline = kind(
        scheduler=scheduler,
        vae=vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
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
    packed = pipeline._pack_latents(noise, *noise.shape)
    drawn = run(
        pipeline, family, steps, pictures=pictures, prompt=prompts, guidance_scale=guidance, latents=packed
    ).images
    return drawn if pictures else pipeline._unpack_latents(drawn, family.height, family.width, family.size_unit // 2)
