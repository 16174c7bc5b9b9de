"""open_clip's CLIP as transformers': names, fused projections, transposes. Sizes are read from the shapes.

Layout of github.com/mlfoundations/open_clip (`CLIP` with the native text tower), which ViT-H-14 files are in.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

from torch import Tensor

from opd_ds.rewards.checkpoints import State, from_transformers, layers, refuse, shape

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

_TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
_IN_A_LAYER = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def clip_from_open_clip(state: State, heads: int, origin: str) -> CLIPModel:
    """transformers' CLIPModel with the weights of `state`, in float32.

    Args:
        heads: attention heads of both towers, which shapes do not tell.
        origin: what error messages call the weights.

    Raises:
        WrongWeightsError: keys are missing, unknown or of another shape.
    """
    from transformers import CLIPModel

    config = _config(state, heads, origin)
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        converted.update(_converted(key, value))
    refuse(f"{origin} is not in open_clip's layout", unexpected=converted.keys() & state.keys() - {"logit_scale"})
    return from_transformers(CLIPModel, None, origin, config=config, state_dict=converted)


def _converted(key: str, value: Tensor) -> dict[str, Tensor]:
    """transformers' tensors for one of open_clip's; an unknown key stays as it is."""
    if key in _OUTSIDE:
        return {_OUTSIDE[key]: value}
    if key in _TRANSPOSED:
        return {_TRANSPOSED[key]: value.T.contiguous()}
    for theirs, ours in _TOWERS.items():
        if key.startswith(theirs):
            number, _, rest = key[len(theirs) :].partition(".")
            name, _, kind = rest.rpartition(".")
            if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = rest.removeprefix("attn.in_proj_")
                parts = zip("qkv", value.chunk(3), strict=True)
                return {f"{ours}{number}.self_attn.{p}_proj.{kind}": part.contiguous() for p, part in parts}
            if name in _IN_A_LAYER:
                return {f"{ours}{number}.{_IN_A_LAYER[name]}.{kind}": value}
    return {key: value}


def _config(state: State, heads: int, origin: str) -> CLIPConfig:
    from transformers import CLIPConfig

    width, _, patch, _ = shape(state, "visual.conv1.weight", 4, origin)
    positions, _ = shape(state, "visual.positional_embedding", 2, origin)
    length, text_width = shape(state, "positional_embedding", 2, origin)
    vocabulary, _ = shape(state, "token_embedding.weight", 2, origin)
    _, joint = shape(state, "text_projection", 2, origin)
    common = {"num_attention_heads": heads, "hidden_act": "gelu", "projection_dim": joint}
    return CLIPConfig(
        projection_dim=joint,
        text_config={
            **common,
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": shape(state, "transformer.resblocks.0.mlp.c_fc.weight", 2, origin)[0],
            "num_hidden_layers": layers(state, "transformer.resblocks."),
            "max_position_embeddings": length,
            # open_clip pools at the largest id, which is the end token.
            "eos_token_id": vocabulary - 1,
            "bos_token_id": vocabulary - 2,
        },
        vision_config={
            **common,
            "hidden_size": width,
            "intermediate_size": shape(state, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2, origin)[0],
            "num_hidden_layers": layers(state, "visual.transformer.resblocks."),
            "patch_size": patch,
            "image_size": patch * isqrt(positions - 1),
        },
    )
