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
from opd_ds.testing.tiny.parts import DYNAMIC_SHIFT, TEXTS, VAE_BLOCKS, references, run, save

_CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write(folder: Path, seed: int = 0, *, is_distilled: bool = False) -> Path:
    """A pipeline folder of FLUX.2-klein-base's form (klein's with `is_distilled`) with random weights.

    Its own size is 16 x 16 pixels: 4 x 4 patches.
    """
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer(_CHAT)
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
    parts = {**network_parts(guidance_embeds=False), "text_encoder": Qwen3ForCausalLM(qwen), "tokenizer": tokenizer}
    return save(Flux2KleinPipeline(**parts, is_distilled=is_distilled), folder)


def chat_tokenizer(template: str) -> Any:
    tokenizer = make_tokenizer([*TEXTS, "user: assistant: "], 64)
    tokenizer.chat_template = template
    return tokenizer


def network_parts(*, guidance_embeds: bool) -> dict[str, Any]:
    """All but the text encoder; its states have 16 channels."""
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    vae = AutoencoderKLFlux2(**VAE_BLOCKS)
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return {"transformer": transformer, "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(**DYNAMIC_SHIFT)}


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
    rows = []
    for row, (prompt, own) in enumerate(zip(prompts, references(family, len(prompts)), strict=True)):
        asked = {"prompt": [prompt], "guidance_scale": guidance, "latents": noise[row : row + 1]}
        seen = {"image": [picture.load() for picture in own]} if own else {}
        rows.append(run(pipeline, family, steps, pictures=pictures, **asked, **seen).images)
    drawn = torch.cat(rows)
    if pictures:
        return drawn
    if drawn.ndim == 3:  # dev's pipeline hands out its tokens
        return drawn.transpose(1, 2).unflatten(2, noise.shape[2:])
    # Klein's hands out latents as its VAE takes them.
    statistics, config = pipeline.vae.bn, pipeline.vae.config
    mean, var = (value.view(1, -1, 1, 1) for value in (statistics.running_mean, statistics.running_var))
    return (pipeline._patchify_latents(drawn) - mean) / (var + config.batch_norm_eps).sqrt()
