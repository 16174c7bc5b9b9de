"""A tiny random FLUX.2 dev."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import Flux2Pipeline
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from opd_ds.testing.tiny.flux2 import chat_tokenizer, draw, network_parts
from opd_ds.testing.tiny.parts import save

__all__ = ["draw", "write"]

_CHAT = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}{{ part.text }}{% endfor %}\n"
    "{% endfor %}"
)


def write(folder: Path, seed: int = 0) -> Path:
    """A pipeline folder of FLUX.2-dev's form with random weights; its tokenizer is not inside a processor."""
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer(_CHAT)
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 30,  # the pipeline takes states of layers 10, 20 and 30
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.3,  # smaller ones leave all prompts' states alike
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 3,
    }
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    parts = {**network_parts(guidance_embeds=True), "text_encoder": encoder, "tokenizer": tokenizer}
    return save(Flux2Pipeline(**parts), folder)
