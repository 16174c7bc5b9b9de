"""What each diffusers transformer takes, without data: for passes on the meta device.

Families build these from real prompts and ask how long they are, which tensors without data cannot answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_ds.errors import UserError

_CLIP_STATES = 257  # of a picture, by ViT-H/14 at 224 pixels

Shape = tuple[int, ...]
# (transformer's config, latent shapes (C, h, w) or (C, f, h, w) of the sample and of its reference pictures, batch,
# tokens of text, dtype) -> keyword arguments
_Inputs = Callable[[dict[str, Any], Sequence[Shape], int, int, torch.dtype], dict[str, Any]]


def network_inputs(
    transformer_class: str,
    config: dict[str, Any],
    latent_shape: Shape,
    batch: int,
    text: int,
    dtype: torch.dtype,
    references: Sequence[Shape] = (),
) -> dict[str, Any]:
    """Keyword arguments of one forward, tensors on meta.

    Args:
        text: tokens of the longest prompt.
        references: latent shapes of each row's reference pictures.

    Raises:
        UserError: a transformer that is not known here.
    """
    if transformer_class not in _INPUTS:
        raise UserError(
            f"the plan does not know what {transformer_class} takes; it knows {', '.join(_INPUTS)}; add it to "
            "opd_ds/plan/inputs.py"
        )
    with torch.device("meta"):
        return _INPUTS[transformer_class](config, [latent_shape, *references], batch, text, dtype)


def _sd3(config: dict[str, Any], latents: Sequence[Shape], batch: int, text: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(batch, *latents[0], dtype=dtype),
        "timestep": torch.empty(batch),
        "encoder_hidden_states": torch.empty(batch, text, config["joint_attention_dim"], dtype=dtype),
        "pooled_projections": torch.empty(batch, config["pooled_projection_dim"], dtype=dtype),
        "return_dict": False,
    }


def _flux(
    config: dict[str, Any], latents: Sequence[Shape], batch: int, text: int, dtype: torch.dtype
) -> dict[str, Any]:
    tokens, channels = _patches(latents, config["in_channels"])
    return {
        "hidden_states": torch.empty(batch, tokens, channels, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
        "guidance": torch.empty(batch) if config["guidance_embeds"] else None,
        "pooled_projections": torch.empty(batch, config["pooled_projection_dim"], dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, text, config["joint_attention_dim"], dtype=dtype),
        "txt_ids": torch.empty(text, 3),
        "img_ids": torch.empty(tokens, 3),
        "return_dict": False,
    }


def _flux2(
    config: dict[str, Any], latents: Sequence[Shape], batch: int, text: int, dtype: torch.dtype
) -> dict[str, Any]:
    tokens, channels = _patches(latents, config["in_channels"])
    return {
        "hidden_states": torch.empty(batch, tokens, channels, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
        "guidance": torch.empty(batch) if config["guidance_embeds"] else None,
        "encoder_hidden_states": torch.empty(batch, text, config["joint_attention_dim"], dtype=dtype),
        "txt_ids": torch.empty(text, 4),
        "img_ids": torch.empty(tokens, 4),
        "return_dict": False,
    }


def _qwen_image(
    config: dict[str, Any], latents: Sequence[Shape], batch: int, text: int, dtype: torch.dtype
) -> dict[str, Any]:
    tokens, channels = _patches(latents, config["in_channels"])
    return {
        "hidden_states": torch.empty(batch, tokens, channels, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, text, config["joint_attention_dim"], dtype=dtype),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, latent[-2] // 2, latent[-1] // 2) for latent in latents]] * batch,
        "return_dict": False,
    }


def _z_image(
    config: dict[str, Any], latents: Sequence[Shape], batch: int, text: int, dtype: torch.dtype
) -> dict[str, Any]:
    channels, h, w = latents[0]
    return {
        "x": [torch.empty(channels, 1, h, w, dtype=dtype) for _ in range(batch)],
        "t": torch.empty(batch),
        "cap_feats": [torch.empty(text, config["cap_feat_dim"], dtype=dtype) for _ in range(batch)],
        "return_dict": False,
    }


def _wan(config: dict[str, Any], latents: Sequence[Shape], batch: int, text: int, dtype: torch.dtype) -> dict[str, Any]:
    inputs = {
        # With a first frame that is given, its channels stand behind those of the latents.
        "hidden_states": torch.empty(batch, config["in_channels"], *latents[0][1:], dtype=dtype),
        "timestep": torch.empty(batch),
        "encoder_hidden_states": torch.empty(batch, text, config["text_dim"], dtype=dtype),
        "return_dict": False,
    }
    if config.get("image_dim") is not None:
        inputs["encoder_hidden_states_image"] = torch.empty(batch, _CLIP_STATES, config["image_dim"], dtype=dtype)
    return inputs


def _ltx(config: dict[str, Any], latents: Sequence[Shape], batch: int, text: int, dtype: torch.dtype) -> dict[str, Any]:
    channels, frames, height, width = latents[0]
    return {
        "hidden_states": torch.empty(batch, frames * height * width, channels, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, text, config["caption_channels"], dtype=dtype),
        "timestep": torch.empty(batch),
        "encoder_attention_mask": None,
        "num_frames": frames,
        "height": height,
        "width": width,
        "return_dict": False,
    }


def _patches(latents: Sequence[Shape], channels: int) -> tuple[int, int]:
    """Tokens and their width, of latents that are packed into patches outside of the network (or were, by the VAE)."""
    return sum(math.prod(latent) // channels for latent in latents), channels


_INPUTS: dict[str, _Inputs] = {
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
    "WanTransformer3DModel": _wan,
    "LTXVideoTransformer3DModel": _ltx,
}


def squared_sum(output: Any) -> Tensor:
    """A loss of what a transformer returns, as costly as a velocity error: float32, one number."""
    first = output[0]
    parts = first if isinstance(first, list) else [first]
    return torch.stack([part.float().square().sum() for part in parts]).sum()
