"""A tiny checkpoint in the layout of mmdet's Mask2Former, the same numbers on every machine. Needs numpy and torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch

EMBED, DEPTHS, HEADS, WINDOW = 12, (1, 1, 2, 1), (1, 2, 2, 4), 4
HIDDEN, PIXEL_FFN, DECODER_FFN, QUERIES, LAYERS, CLASSES = 32, 48, 40, 10, 2, 80

Shape = tuple[int, ...]


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Keys of mmdet 3.x; float32."""
    random = np.random.RandomState(seed)  # its stream is frozen, unlike that of numpy's newer generators
    tensors = {}
    for key, shape in _shapes():
        values = random.standard_normal(shape)
        if key.endswith("bias") or len(shape) == 1:
            values = 0.1 * values + (0.0 if key.endswith("bias") else 1.0)
        elif "embed" not in key or "mask_embed" in key or "patch_embed" in key:
            values *= np.prod(shape[1:]) ** -0.5
        tensors[key] = torch.from_numpy(values.astype(np.float32))
    for stage, depth in enumerate(DEPTHS):
        for block in range(depth):
            index = f"backbone.stages.{stage}.blocks.{block}.attn.w_msa.relative_position_index"
            tensors[index] = torch.zeros(WINDOW**2, WINDOW**2, dtype=torch.int64)
    return tensors


def mmdet2_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors as mmdet 2.x names them."""
    names = {
        r"(transformer_decoder\.layers\.\d+)\.cross_attn": r"\1.attentions.0",
        r"(transformer_decoder\.layers\.\d+)\.self_attn": r"\1.attentions.1",
        r"(pixel_decoder\.encoder\.layers\.\d+)\.self_attn": r"\1.attentions.0",
        r"(panoptic_head\..*layers\.\d+)\.ffn\.": r"\1.ffns.0.",
    }
    renamed = {}
    for key, value in tensors.items():
        for pattern, name in names.items():
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


def pixels(seed: int = 1) -> torch.Tensor:
    """[1, 3, 64, 96] float32."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((1, 3, 64, 96)).astype(np.float32))


def _shapes() -> Iterator[tuple[str, Shape]]:
    yield from _layer("backbone.patch_embed.projection", (EMBED, 3, 4, 4))
    yield from _layer("backbone.patch_embed.norm", (EMBED,))
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        width = EMBED * 2**stage
        for block in range(depth):
            yield from _swin_block(f"backbone.stages.{stage}.blocks.{block}", width, heads)
        if stage < len(DEPTHS) - 1:
            yield from _layer(f"backbone.stages.{stage}.downsample.norm", (4 * width,))
            yield f"backbone.stages.{stage}.downsample.reduction.weight", (2 * width, 4 * width)
        yield from _layer(f"backbone.norm{stage}", (width,))
    yield from _pixel_decoder("panoptic_head.pixel_decoder")
    yield from _decoder("panoptic_head.transformer_decoder")
    for name, rows in (("query_embed", QUERIES), ("query_feat", QUERIES), ("level_embed", 3)):
        yield f"panoptic_head.{name}.weight", (rows, HIDDEN)
    yield from _layer("panoptic_head.cls_embed", (CLASSES + 1, HIDDEN))
    for index in (0, 2, 4):
        yield from _layer(f"panoptic_head.mask_embed.{index}", (HIDDEN, HIDDEN))


def _layer(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _swin_block(name: str, width: int, heads: int) -> Iterator[tuple[str, Shape]]:
    yield from _layer(f"{name}.norm1", (width,))
    yield f"{name}.attn.w_msa.relative_position_bias_table", ((2 * WINDOW - 1) ** 2, heads)
    yield from _layer(f"{name}.attn.w_msa.qkv", (3 * width, width))
    yield from _layer(f"{name}.attn.w_msa.proj", (width, width))
    yield from _layer(f"{name}.norm2", (width,))
    yield from _ffn(name, width, 4 * width)


def _ffn(name: str, width: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield from _layer(f"{name}.ffn.layers.0.0", (inner, width))
    yield from _layer(f"{name}.ffn.layers.1", (width, inner))


def _norms(name: str, count: int) -> Iterator[tuple[str, Shape]]:
    for index in range(count):
        yield from _layer(f"{name}.norms.{index}", (HIDDEN,))


def _pixel_decoder(name: str) -> Iterator[tuple[str, Shape]]:
    for index, stage in enumerate((3, 2, 1)):
        yield from _layer(f"{name}.input_convs.{index}.conv", (HIDDEN, EMBED * 2**stage, 1, 1))
        yield from _layer(f"{name}.input_convs.{index}.gn", (HIDDEN,))
    for index in range(LAYERS):
        layer = f"{name}.encoder.layers.{index}"
        points = 8 * 3 * 4  # heads, levels, points
        yield from _layer(f"{layer}.self_attn.sampling_offsets", (2 * points, HIDDEN))
        yield from _layer(f"{layer}.self_attn.attention_weights", (points, HIDDEN))
        yield from _layer(f"{layer}.self_attn.value_proj", (HIDDEN, HIDDEN))
        yield from _layer(f"{layer}.self_attn.output_proj", (HIDDEN, HIDDEN))
        yield from _ffn(layer, HIDDEN, PIXEL_FFN)
        yield from _norms(layer, 2)
    yield f"{name}.level_encoding.weight", (3, HIDDEN)
    for conv, shape in (("lateral_convs", (HIDDEN, EMBED, 1, 1)), ("output_convs", (HIDDEN, HIDDEN, 3, 3))):
        yield f"{name}.{conv}.0.conv.weight", shape
        yield from _layer(f"{name}.{conv}.0.gn", (HIDDEN,))
    yield from _layer(f"{name}.mask_feature", (HIDDEN, HIDDEN, 1, 1))


def _decoder(name: str) -> Iterator[tuple[str, Shape]]:
    for index in range(LAYERS):
        layer = f"{name}.layers.{index}"
        for attention in ("self_attn", "cross_attn"):
            yield f"{layer}.{attention}.attn.in_proj_weight", (3 * HIDDEN, HIDDEN)
            yield f"{layer}.{attention}.attn.in_proj_bias", (3 * HIDDEN,)
            yield from _layer(f"{layer}.{attention}.attn.out_proj", (HIDDEN, HIDDEN))
        yield from _ffn(layer, HIDDEN, DECODER_FFN)
        yield from _norms(layer, 3)
    yield from _layer(f"{name}.post_norm", (HIDDEN,))
