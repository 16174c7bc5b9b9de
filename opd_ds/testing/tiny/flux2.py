"""A tiny random FLUX.2 klein."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_ds.miniature.networks import make_tokenizer
from opd_ds.models.base import ModelFamily
from opd_ds.testing.tiny.parts import DYNAMIC_SHIFT, TEXTS, VAE_BLOCKS, run, save

_CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write(folder: Path, seed: int = 0, *, is_distilled: bool = False) -> Path:
    """A pipeline folder of FLUX.2-klein-base's form (klein's with `is_distilled`) with random weights.

    Its own size is 16 x 16 pixels: 4 x 4 patches.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer([*TEXTS, "user: assistant: "], 64)
    tokenizer.chat_template = _CHAT
    qwen = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=28,  # the pipeline takes states of layers 9, 18 and 27
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,  # smaller ones leave all prompts' states alike
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(**VAE_BLOCKS)
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC_SHIFT),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(qwen),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=is_distilled,
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
    drawn = run(
        pipeline, family, steps, pictures=pictures, prompt=prompts, guidance_scale=guidance, latents=noise
    ).images
    if pictures:
        return drawn
    # The pipeline hands out latents as its VAE takes them.
    statistics, config = pipeline.vae.bn, pipeline.vae.config
    mean, var = (value.view(1, -1, 1, 1) for value in (statistics.running_mean, statistics.running_var))
    return (pipeline._patchify_latents(drawn) - mean) / (var + config.batch_norm_eps).sqrt()
