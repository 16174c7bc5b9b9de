"""A tiny random Qwen-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from opd_ds.models import ModelFamily
from opd_ds.models.qwen_image import pack, unpack
from opd_ds.testing.tiny.parts import run, save
from opd_ds.testing.tiny.qwen_tokenizer import make_tokenizer


def write(folder: Path, seed: int = 0, kind: Any = QwenImagePipeline) -> Path:
    """A whole folder of the pipeline `kind`; another seed gives other weights.

    Returns:
        `folder`.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[-0.7, 0.3, 0.1, -0.2],
        latents_std=[2.8, 1.4, 0.9, 2.0],
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    placeholder, start = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>"])
    pictures = {"image_token_id": placeholder, "vision_start_token_id": start}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **pictures))
    more = {} if kind is QwenImagePipeline else {"processor": None}
    pipeline = kind(
        transformer=transformer,
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
        **more,
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
    guided = {
        "true_cfg_scale": guidance,
        "negative_prompt": None if guidance == 1 else [family.negative_prompt] * len(prompts),
    }
    drawn = run(pipeline, family, steps, pictures=pictures, prompt=prompts, latents=pack(noise), **guided).images
    return drawn if pictures else unpack(drawn, *noise.shape[-2:])
