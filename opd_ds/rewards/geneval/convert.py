"""mmdet's Mask2Former with a Swin backbone, as transformers' `Mask2FormerForUniversalSegmentation`.

mmdet 2.x and 3.x name a part of the keys differently; both are read. Every size is taken from the tensors' shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from opd_ds.rewards.weights import WrongWeightsError

if TYPE_CHECKING:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

# transformers fixes the number of sampling points of a head and level in the pixel decoder.
_POINTS = 4
# mmdet's file does not have these and nothing at inference reads them: the norm after Swin's last stage, the loss.
_UNUSED = re.compile(r"model\.pixel_level_module\.encoder\.swin\.layernorm\.(weight|bias)|criterion\.empty_weight")

_MMDET2_NAMES = (
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.0\.", r"\1.cross_attn."),
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.1\.", r"\1.self_attn."),
    (r"(pixel_decoder\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"(panoptic_head\..*layers\.\d+)\.ffns\.0\.", r"\1.ffn."),
)

_SWIN = "model.pixel_level_module.encoder.swin"
_BLOCK = rf"{_SWIN}.encoder.layers.\1.blocks.\2"
_PIXEL = "model.pixel_level_module.decoder"
_DECODER = "model.transformer_module.decoder"
_FROM_BLOCK = r"backbone\.stages\.(\d+)\.blocks\.(\d+)"
_FROM_PIXEL = r"panoptic_head\.pixel_decoder"
_FROM_DECODER = r"panoptic_head\.transformer_decoder"
# Names with a plain counterpart; what follows the match (weight, bias, or more) stays.
_RENAMED = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"backbone\.patch_embed\.projection\.", rf"{_SWIN}.embeddings.patch_embeddings.projection."),
        (r"backbone\.patch_embed\.norm\.", rf"{_SWIN}.embeddings.norm."),
        (_FROM_BLOCK + r"\.norm1\.", _BLOCK + ".layernorm_before."),
        (_FROM_BLOCK + r"\.norm2\.", _BLOCK + ".layernorm_after."),
        (_FROM_BLOCK + r"\.attn\.w_msa\.(?=relative_position)", _BLOCK + ".attention.relative_position_bias."),
        (_FROM_BLOCK + r"\.attn\.w_msa\.proj\.", _BLOCK + ".attention.o_proj."),
        (_FROM_BLOCK + r"\.ffn\.layers\.0\.0\.", _BLOCK + ".mlp.fc1."),
        (_FROM_BLOCK + r"\.ffn\.layers\.1\.", _BLOCK + ".mlp.fc2."),
        (r"backbone\.stages\.(\d+)\.downsample\.", rf"{_SWIN}.encoder.layers.\1.downsample."),
        (_FROM_PIXEL + r"\.input_convs\.(\d+)\.conv\.", rf"{_PIXEL}.input_projections.\1.0."),
        (_FROM_PIXEL + r"\.input_convs\.(\d+)\.gn\.", rf"{_PIXEL}.input_projections.\1.1."),
        (_FROM_PIXEL + r"\.encoder\.layers\.(\d+)\.self_attn\.", rf"{_PIXEL}.encoder.layers.\1.self_attn."),
        (_FROM_PIXEL + r"\.encoder\.layers\.(\d+)\.norms\.0\.", rf"{_PIXEL}.encoder.layers.\1.self_attn_layer_norm."),
        (_FROM_PIXEL + r"\.encoder\.layers\.(\d+)\.norms\.1\.", rf"{_PIXEL}.encoder.layers.\1.final_layer_norm."),
        (_FROM_PIXEL + r"\.encoder\.layers\.(\d+)\.ffn\.layers\.0\.0\.", rf"{_PIXEL}.encoder.layers.\1.fc1."),
        (_FROM_PIXEL + r"\.encoder\.layers\.(\d+)\.ffn\.layers\.1\.", rf"{_PIXEL}.encoder.layers.\1.fc2."),
        (_FROM_PIXEL + r"\.level_encoding\.weight", f"{_PIXEL}.level_embed"),
        (_FROM_PIXEL + r"\.lateral_convs\.0\.conv\.", f"{_PIXEL}.adapter_1.0."),
        (_FROM_PIXEL + r"\.lateral_convs\.0\.gn\.", f"{_PIXEL}.adapter_1.1."),
        (_FROM_PIXEL + r"\.output_convs\.0\.conv\.", f"{_PIXEL}.layer_1.0."),
        (_FROM_PIXEL + r"\.output_convs\.0\.gn\.", f"{_PIXEL}.layer_1.1."),
        (_FROM_PIXEL + r"\.mask_feature\.", f"{_PIXEL}.mask_projection."),
        (_FROM_DECODER + r"\.layers\.(\d+)\.(self|cross)_attn\.attn\.", rf"{_DECODER}.layers.\1.\2_attn."),
        (_FROM_DECODER + r"\.layers\.(\d+)\.norms\.0\.", rf"{_DECODER}.layers.\1.cross_attn_layer_norm."),
        (_FROM_DECODER + r"\.layers\.(\d+)\.norms\.1\.", rf"{_DECODER}.layers.\1.self_attn_layer_norm."),
        (_FROM_DECODER + r"\.layers\.(\d+)\.norms\.2\.", rf"{_DECODER}.layers.\1.final_layer_norm."),
        (_FROM_DECODER + r"\.layers\.(\d+)\.ffn\.layers\.0\.0\.", rf"{_DECODER}.layers.\1.fc1."),
        (_FROM_DECODER + r"\.layers\.(\d+)\.ffn\.layers\.1\.", rf"{_DECODER}.layers.\1.fc2."),
        (_FROM_DECODER + r"\.post_norm\.", f"{_DECODER}.layernorm."),
        (r"panoptic_head\.query_embed\.", "model.transformer_module.queries_embedder."),
        (r"panoptic_head\.query_feat\.", "model.transformer_module.queries_features."),
        (r"panoptic_head\.level_embed\.", "model.transformer_module.level_embed."),
        (r"panoptic_head\.cls_embed\.", "class_predictor."),
    )
)  # fmt: skip


def mask2former_from_mmdet(state: Mapping[str, Tensor], origin: str) -> Mask2FormerForUniversalSegmentation:
    """The network with mmdet's weights, in evaluation mode.

    Args:
        state: the checkpoint's `state_dict`, keys as in mmdet 2.x or 3.x.
        origin: what error messages call it.

    Raises:
        WrongWeightsError: keys are missing, unknown or of another shape.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    named = {_mmdet3_name(key): value for key, value in state.items()}
    try:
        config = _config(named)
    except (KeyError, IndexError) as error:
        raise WrongWeightsError(f"{origin} is not mmdet's Mask2Former with a Swin backbone: no {error}") from error
    model = Mask2FormerForUniversalSegmentation(config).eval()
    converted, unknown = _convert(named)
    try:
        keys = model.load_state_dict(converted, strict=False)
    except RuntimeError as error:  # shapes
        raise WrongWeightsError(f"{origin}: {' '.join(str(error).split())[:300]}") from error
    missing = [key for key in keys.missing_keys if not _UNUSED.fullmatch(key)]
    unexpected = unknown + keys.unexpected_keys
    if missing or unexpected:
        raise WrongWeightsError(
            f"{origin} is not mmdet's Mask2Former with a Swin backbone: "
            f"missing after conversion {missing[:3]} ({len(missing)}), unexpected {unexpected[:3]} ({len(unexpected)})"
        )
    return model


def _mmdet3_name(key: str) -> str:
    for pattern, name in _MMDET2_NAMES:
        key = re.sub(pattern, name, key)
    return key


def _convert(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """transformers' tensors, and the keys of `state` that no rule knows."""
    converted: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in state.items():
        if key.endswith("relative_position_index"):
            continue  # a constant of the window size
        if ".downsample." in key:
            value = _merged_in_transformers_order(value)
        parts = _converted_parts(key, value)
        if parts is None:
            unknown.append(key)
        else:
            converted.update(parts)
    return converted, unknown


def _converted_parts(key: str, value: Tensor) -> dict[str, Tensor] | None:
    if match := re.fullmatch(_FROM_BLOCK + r"\.attn\.w_msa\.qkv\.(weight|bias)", key):
        stem = match.expand(_BLOCK + ".attention")
        return _split_qkv(stem, match[3], value)
    if match := re.fullmatch(_FROM_DECODER + r"\.layers\.(\d+)\.self_attn\.attn\.in_proj_(weight|bias)", key):
        return _split_qkv(f"{_DECODER}.layers.{match[1]}.self_attn", match[2], value)
    if match := re.fullmatch(r"backbone\.norm(\d)\.(weight|bias)", key):
        return {f"model.pixel_level_module.encoder.hidden_states_norms.stage{int(match[1]) + 1}.{match[2]}": value}
    if match := re.fullmatch(r"panoptic_head\.mask_embed\.(\d+)\.(weight|bias)", key):
        # A Sequential of Linear and ReLU there, of blocks of both here.
        return {f"{_DECODER}.mask_predictor.mask_embedder.{int(match[1]) // 2}.0.{match[2]}": value}
    for pattern, name in _RENAMED:
        if match := pattern.match(key):
            return {match.expand(name) + key[match.end() :]: value}
    return None


def _split_qkv(stem: str, kind: str, value: Tensor) -> dict[str, Tensor]:
    return {f"{stem}.{name}_proj.{kind}": part for name, part in zip("qkv", value.chunk(3), strict=True)}


def _merged_in_transformers_order(value: Tensor) -> Tensor:
    """Patch merging's input dimension (the last), from nn.Unfold's order to that of concatenated neighbours.

    mmdet: channel, then (top left, top right, bottom left, bottom right). transformers: (top left, bottom left,
    top right, bottom right), then channel.
    """
    by_neighbour = value.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return by_neighbour[..., [0, 2, 1, 3], :].flatten(-2)


def _config(state: Mapping[str, Tensor]) -> Mask2FormerConfig:
    """Sizes from shapes; raises KeyError where a key that tells one is absent."""
    from transformers import Mask2FormerConfig, SwinConfig

    def shape(key: str) -> tuple[int, ...]:
        return tuple(state[key].shape)

    stages = _count(state, r"backbone\.stages\.(\d+)\.")
    tables = [
        shape(f"backbone.stages.{stage}.blocks.0.attn.w_msa.relative_position_bias_table") for stage in range(stages)
    ]
    embed_dim, channels, patch, _ = shape("backbone.patch_embed.projection.weight")
    backbone = SwinConfig(
        num_channels=channels,
        patch_size=patch,
        embed_dim=embed_dim,
        depths=[_count(state, rf"backbone\.stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)],
        num_heads=[heads for _, heads in tables],
        window_size=(round(tables[0][0] ** 0.5) + 1) // 2,
        mlp_ratio=shape("backbone.stages.0.blocks.0.ffn.layers.0.0.weight")[0] / embed_dim,
        out_features=[f"stage{stage + 1}" for stage in range(stages)],
    )
    pixel, decoder = "panoptic_head.pixel_decoder", "panoptic_head.transformer_decoder"
    levels, hidden = shape(f"{pixel}.level_encoding.weight")
    queries, _ = shape("panoptic_head.query_feat.weight")
    heads_x_levels_x_points, _ = shape(f"{pixel}.encoder.layers.0.self_attn.attention_weights.weight")
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=hidden,
        mask_feature_size=shape(f"{pixel}.mask_feature.weight")[0],
        hidden_dim=hidden,
        # transformers counts the prediction from the untouched queries as a layer.
        decoder_layers=_count(state, r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.") + 1,
        dim_feedforward=shape(f"{decoder}.layers.0.ffn.layers.0.0.weight")[0],
        num_queries=queries,
        num_labels=shape("panoptic_head.cls_embed.weight")[0] - 1,
        num_attention_heads=heads_x_levels_x_points // (levels * _POINTS),
        encoder_layers=_count(state, r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\."),
        encoder_feedforward_dim=shape(f"{pixel}.encoder.layers.0.ffn.layers.0.0.weight")[0],
    )


def _count(keys: Iterable[str], pattern: str) -> int:
    """One more than the largest index that `pattern` captures; 0 when no key matches."""
    return max((int(match[1]) for key in keys if (match := re.match(pattern, key))), default=-1) + 1
