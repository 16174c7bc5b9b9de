"""Which kernel attention runs with, through the dispatcher of diffusers (0.42)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import get_args

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import nn

from opd_ds.config.sections import AttentionBackend
from opd_ds.errors import UserError, shortened


@dataclass(frozen=True)
class _Backend:
    """What diffusers calls it, and what it can do."""

    name: str
    masks: bool = True
    half_only: bool = True  # fp16 and bf16
    accelerator_only: bool = True


BACKENDS: dict[AttentionBackend, _Backend] = {
    "native": _Backend("native", half_only=False, accelerator_only=False),
    "math": _Backend("_native_math", half_only=False, accelerator_only=False),
    "efficient": _Backend("_native_efficient", half_only=False),
    "cudnn": _Backend("_native_cudnn"),
    "native_flash": _Backend("_native_flash", masks=False),
    "flash": _Backend("flash", masks=False),
    "flash_varlen": _Backend("flash_varlen"),
    "flash3": _Backend("_flash_3", masks=False),
    "flash3_varlen": _Backend("_flash_varlen_3"),
    "flex": _Backend("flex", half_only=False),
    "xformers": _Backend("xformers", half_only=False),
}
_MASKED = [name for name, backend in BACKENDS.items() if backend.masks]


def check_attention(
    backend: AttentionBackend, network: nn.Module, *, dtype: torch.dtype, device: torch.device, masked: bool
) -> None:
    """Raise UserError where `model.attention`, other than auto, cannot be had; `network` may be on meta.

    Args:
        dtype: that the network computes in.
        masked: whether prompts of different lengths stand in one batch.
    """
    wanted, key = BACKENDS[backend], f"model.attention = {backend!r}"
    if not any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in network.modules()):
        raise UserError(
            f"{key}: attention of {type(network).__name__} does not go through diffusers' dispatcher, so torch chooses "
            "its kernel; set it to auto"
        )
    if wanted.accelerator_only and device.type == "cpu":
        raise UserError(f"{key} needs an accelerator; set it to auto")
    if wanted.half_only and dtype == torch.float32:
        raise UserError(f"{key} computes in fp16 and bf16 only; set precision to bf16, or model.attention to auto")
    if masked and not wanted.masks:
        raise UserError(
            f"{key} knows no mask, which prompts of different lengths need here; set it to one of {', '.join(_MASKED)}"
        )
    try:
        set_attention(network, backend)
    except (RuntimeError, ImportError) as error:
        reason = shortened(" ".join(str(error).split()), 200)
        raise UserError(f"{key} is not installed ({reason}); install it, or set model.attention to auto") from error


def set_attention(network: nn.Module, backend: AttentionBackend) -> None:
    """Let `network` run attention with `backend`; `auto` leaves it as diffusers made it."""
    if backend == "auto":
        return
    noisy = logging.getLogger("diffusers.models.modeling_utils")
    before = noisy.level
    noisy.setLevel(logging.ERROR)  # says at every network that the interface may change
    try:
        # The method also sets the default of the process, which the context gives back.
        with attention_backend("native"):
            network.set_attention_backend(BACKENDS[backend].name)  # type: ignore[operator]
    finally:
        noisy.setLevel(before)


assert set(BACKENDS) | {"auto"} == set(get_args(AttentionBackend))
