"""A small BLIP with ImageReward's head, random weights in the published layout. Needs torch only."""

from __future__ import annotations

import torch

from tests.rewards.clip_world import State, head_state

VISION, TEXT, WORDS = 32, 24, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "##s", ",", "two", "dog", "bench"]
SIZE, PATCH = 32, 8


def random_state() -> State:
    generator = torch.Generator().manual_seed(11)

    def linear(name: str, out: int, inner: int) -> State:
        return {
            f"{name}.weight": torch.randn(out, inner, generator=generator) / inner**0.5,
            f"{name}.bias": 0.2 * torch.randn(out, generator=generator),
        }

    def norm(name: str, width: int) -> State:
        return {
            f"{name}.weight": 1 + 0.2 * torch.randn(width, generator=generator),
            f"{name}.bias": 0.2 * torch.randn(width, generator=generator),
        }

    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    state = {
        f"{vision}cls_token": torch.randn(1, 1, VISION, generator=generator),
        f"{vision}pos_embed": torch.randn(1, 1 + (SIZE // PATCH) ** 2, VISION, generator=generator),
        f"{vision}patch_embed.proj.weight": torch.randn(VISION, 3, PATCH, PATCH, generator=generator) / 14,
        f"{vision}patch_embed.proj.bias": torch.randn(VISION, generator=generator),
        f"{text}embeddings.word_embeddings.weight": torch.randn(len(WORDS) + 2, TEXT, generator=generator),
        f"{text}embeddings.position_embeddings.weight": torch.randn(40, TEXT, generator=generator),
        f"{text}embeddings.position_ids": torch.arange(40)[None],
        **norm(f"{vision}norm", VISION),
        **norm(f"{text}embeddings.LayerNorm", TEXT),
        **linear("blip.vision_proj", 16, VISION),
        **linear("blip.text_proj", 16, TEXT),
        **head_state(TEXT, "mlp.layers."),
    }
    for layer in range(2):
        block = f"{vision}blocks.{layer}"
        state |= norm(f"{block}.norm1", VISION) | norm(f"{block}.norm2", VISION)
        state |= linear(f"{block}.attn.qkv", 3 * VISION, VISION) | linear(f"{block}.attn.proj", VISION, VISION)
        state |= linear(f"{block}.mlp.fc1", 64, VISION) | linear(f"{block}.mlp.fc2", VISION, 64)
        block = f"{text}encoder.layer.{layer}"
        for attention, width in (("attention", TEXT), ("crossattention", VISION)):
            state |= linear(f"{block}.{attention}.self.query", TEXT, TEXT)
            state |= linear(f"{block}.{attention}.self.key", TEXT, width)
            state |= linear(f"{block}.{attention}.self.value", TEXT, width)
            state |= linear(f"{block}.{attention}.output.dense", TEXT, TEXT)
            state |= norm(f"{block}.{attention}.output.LayerNorm", TEXT)
        state |= linear(f"{block}.intermediate.dense", 48, TEXT) | linear(f"{block}.output.dense", TEXT, 48)
        state |= norm(f"{block}.output.LayerNorm", TEXT)
    return state
