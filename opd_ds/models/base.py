"""What a model family must offer, and the two things all families share: conditioning and guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: `embeds` [B, L, D] (token states) and `pooled` [B, P], in the model's dtype."""

    embeds: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return Conditioning(self.embeds[rows], self.pooled[rows])

    def expand(self, count: int) -> Conditioning:
        """A single encoded prompt repeated `count` times, without copying."""
        return Conditioning(self.embeds.expand(count, -1, -1), self.pooled.expand(count, -1))

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        return Conditioning(torch.cat([p.embeds for p in parts]), torch.cat([p.pooled for p in parts]))


class ModelFamily(Protocol):
    """One diffusion architecture: everything around the denoising network, which the engines own.

    `path` is a diffusers folder. Latents are [B, C, h, w] with x_sigma = (1 - sigma) * x0 + sigma * noise and
    velocity = noise - x0.
    """

    path: Path
    dtype: torch.dtype
    device: torch.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one sample."""
        ...

    def sigmas(self, steps: int) -> Tensor:
        """The inference grid of the folder's own scheduler: float64 [steps+1], from noise to image."""
        ...

    def load_transformer(self, path: Path | None = None) -> nn.Module:
        """The denoising network (of another checkpoint folder when `path` is given), on the CPU, in `dtype`."""
        ...

    def check_same_world(self, path: Path) -> None:
        """Raise UserError when the checkpoint at `path` has another scheduler, architecture or latent space."""
        ...

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts on the device; encoders leave the device afterwards when configured so."""
        ...

    def velocity(self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """One pass: latents [B, C, h, w], sigma [B] float32 to velocity [B, C, h, w] in the model's dtype."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pictures [B, 3, H, W], float32 in [0, 1]."""
        ...

    def save_full(self, transformer_state: dict[str, Tensor], folder: Path) -> None:
        """Write a complete diffusers folder with these weights."""
        ...

    def save_lora(self, adapter_state: dict[str, Tensor], lora_config: Any, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors` that the pipeline's `load_lora_weights` reads."""
        ...


def guided_velocity(
    family: ModelFamily,
    transformer: Callable[..., Any],
    latents: Tensor,
    sigma: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    guidance: float,
) -> Tensor:
    """Velocity with classifier-free guidance: v_uncond + guidance * (v_cond - v_uncond), both in one batch.

    A guidance of 1 costs one pass. The order (uncond, cond) and the model-dtype arithmetic are those of diffusers'
    pipelines, so rollout, scoring, training and a user's later inference take the same numeric path.

    Args:
        latents: [B, C, h, w], any float dtype.
        sigma: [B], float32.
        cond: B encoded prompts.
        uncond: one encoded negative prompt.
    """
    if guidance == 1.0:
        return family.velocity(transformer, latents, sigma, cond)
    both = Conditioning.cat([uncond.expand(len(cond)), cond])
    v_uncond, v_cond = family.velocity(transformer, latents.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
    return v_uncond + guidance * (v_cond - v_uncond)
