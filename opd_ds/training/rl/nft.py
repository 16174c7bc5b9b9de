"""DiffusionNFT (arXiv 2509.16117): reinforcement learning on the forward process, by flow matching.

Pictures x0 of an old policy are noised to x = (1 - sigma) x0 + sigma eps. Around the old velocity lie two implicit
ones,

    v+ = beta v + (1 - beta) v_old        v- = (1 + beta) v_old - beta v

and with r in [0, 1], how good a picture is within its group, the loss is r l(v+) / beta + (1 - r) l(v-) / beta, where l
is the squared error of the predicted picture over its own mean size (no gradient), as the authors' code has it. At
v = v_old the gradient is proportional to 2r - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ds.config.rl import NftSection
from opd_ds.diffusion import velocity_error


class NftLoss:
    """A `Loss` that knows velocities `flow` (eps - x0), `old` and, with a KL, `start` [b, C, ...]; `optimality` [b].

    Args:
        sigmas: [T+1], the sampler's grid.
    """

    measures = ("policy", "start_distance")
    # The authors' constant, the clip of their advantages; it keeps learning rates comparable with theirs.
    SCALE = 5.0
    SMALLEST = 1e-5

    def __init__(self, settings: NftSection, sigmas: Tensor, device: torch.device) -> None:
        self._beta, self._kl = settings.beta, settings.kl
        self._sigma = sigmas[:-1].to(device, torch.float32)

    def __call__(self, velocity: Tensor, steps: Tensor, known: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        sigma = self._sigma[steps.to(velocity.device)]
        new, old, flow = (v.float() for v in (velocity, known["old"], known["flow"]))
        plus = self._beta * new + (1 - self._beta) * old
        minus = (1 + self._beta) * old - self._beta * new
        good = known["optimality"]
        policy = good * self._error(plus - flow, sigma) + (1 - good) * self._error(minus - flow, sigma)
        policy = self.SCALE * policy / self._beta
        distance = velocity_error(velocity, known["start"]) if self._kl else torch.zeros_like(policy)
        return policy + self._kl * distance, {"policy": policy, "start_distance": distance}

    def _error(self, difference: Tensor, sigma: Tensor) -> Tensor:
        """Self-normalised squared error of the predicted picture, which is off by sigma * difference: [b]."""
        off = sigma.view(-1, *[1] * (difference.ndim - 1)) * difference
        size = off.detach().abs().double().flatten(1).mean(1).clamp_min(self.SMALLEST)
        return off.square().flatten(1).mean(1) / size.float()
