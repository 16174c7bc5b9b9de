"""Guided velocities with the two that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_ds.models.base import ModelFamily
from opd_ds.models.conditioning import Conditioning


@dataclass(frozen=True)
class GuidedVelocity:
    """A guided velocity [B, C, ...], and what it was made of where guidance takes two passes: the velocities by the
    negative prompt (`uncond`) and by the prompt (`cond`).
    """

    velocity: Tensor
    uncond: Tensor | None = None
    cond: Tensor | None = None

    @property
    def branches(self) -> Tensor | None:
        """Both in one [B, 2, C, ...], `uncond` first."""
        return None if self.uncond is None or self.cond is None else torch.stack([self.uncond, self.cond], 1)


def guide(
    family: ModelFamily,
    network: Callable[..., Any],
    latents: Tensor,
    sigma: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    guidance: float,
    stage: int = 0,
    direction: Tensor | None = None,
) -> GuidedVelocity:
    """`ModelFamily.guided_velocity`, in as many passes, with the branches of it.

    Args:
        direction: [B, C, ...], v_c - v_u in place of the pass with the negative prompt, where guidance takes it.
    """
    if family.passes(guidance) == 1:
        return GuidedVelocity(family.guided_velocity(network, latents, sigma, cond, uncond, guidance, stage))
    family.check_guidance("guidance", guidance)
    network, guidance = family.at_stage(network, stage), family.guidance_at(guidance, stage)
    if direction is not None:
        v_cond = family.velocity(network, latents, sigma, cond)
        return join(family, v_cond - direction, v_cond, guidance)
    return join(family, *family.branches(network, latents, sigma, cond, uncond), guidance)


def join(family: ModelFamily, uncond: Tensor, cond: Tensor, guidance: float) -> GuidedVelocity:
    """What `family` makes of two branches."""
    return GuidedVelocity(family.combine(uncond, cond, guidance), uncond, cond)
