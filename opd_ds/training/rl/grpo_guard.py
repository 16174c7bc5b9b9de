"""GRPO-Guard (arXiv 2510.22319) on Flow-GRPO (arXiv 2505.05470): policy gradient over the transitions of SDE rollouts.

A transition that drew eps has, under the policy in training, the log-ratio mean(D eps) / std - mean(D^2) / (2 std^2)
with D = mean - mean_old. Its mean is below 0 and its size depends on the step through std, so that good samples never
reach the upper clip while bad ones reach the lower. GRPO-Guard takes mean(D eps) for it: zero mean, one scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ds.config.rl import GuardSection
from opd_ds.diffusion import Coefficients, clipped_surrogate, kl_weight, log_ratio, velocity_error


class GrpoGuardLoss:
    """A `Loss` that knows `velocity` (the old policy's), `noise`, with a KL `start` [b, C, ...], and `advantage` [b].

    Args:
        coefficients, sigmas: of the stochastic kernel on the sampler's grid.
    """

    measures = ("policy", "ratio", "clipped", "start_kl")

    def __init__(
        self, settings: GuardSection, coefficients: Coefficients, sigmas: Tensor, device: torch.device
    ) -> None:
        self._settings = settings
        weights = torch.ones_like(coefficients.b)
        if settings.step_weighting == "inverse_dt":
            weights = 1 / (sigmas[:-1] - sigmas[1:]).double()
            weights = weights / weights.mean()
        self._weights, self._b, self._std, self._kl = (
            table.to(device, torch.float32)
            for table in (weights, coefficients.b, coefficients.std, kl_weight(coefficients))
        )

    def __call__(self, velocity: Tensor, steps: Tensor, known: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        steps, advantage, clip = steps.to(velocity.device), known["advantage"], self._settings.clip
        along, plain = log_ratio(velocity, known["velocity"], known["noise"], self._b[steps], self._std[steps])
        ratio = (along if self._settings.ratio == "normalized" else plain).exp()
        policy = self._weights[steps] * clipped_surrogate(ratio, advantage, clip)
        beyond = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip).float()
        loss, kl = policy, torch.zeros_like(policy)
        if self._settings.kl:
            kl = self._kl[steps] * velocity_error(velocity, known["start"])
            loss = policy + self._settings.kl * kl
        return loss, {"policy": policy, "ratio": ratio, "clipped": beyond, "start_kl": kl}
