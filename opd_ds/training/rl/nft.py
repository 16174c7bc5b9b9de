"""DiffusionNFT (arXiv 2509.16117): reinforcement learning on the forward process, by flow matching.

Images x0 of an old policy are noised to x = (1 - sigma) x0 + sigma eps. Around the old velocity lie two implicit
ones,

    v+ = beta v + (1 - beta) v_old        v- = (1 + beta) v_old - beta v

and with r in [0, 1], how good an image is within its group, the loss is r l(v+) / beta + (1 - r) l(v-) / beta, where l
is the squared error of the predicted image over its own mean size (no gradient), as the authors' code has it. At
v = v_old the gradient is proportional to 2r - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ds.config.rl import NftSection
from opd_ds.diffusion import velocity_error
from opd_ds.diffusion.rollout import Trajectory
from opd_ds.engine import OLD_POLICY, WeightSnapshot
from opd_ds.training.buffer import Columns, PerPair, PerState, TrajectoryBuffer, named
from opd_ds.training.rl.advantages import optimality
from opd_ds.training.rl.trainer import RLTrainer
from opd_ds.training.shares import Share, TaskBatch
from opd_ds.training.trainer import Components


@dataclass(frozen=True)
class NftKnown:
    """Of a micro-batch of pairs: the velocities `flow` (eps - x0), `old` and, with a KL, `start` [b, C, ...]; and
    `optimality` [b].
    """

    flow: Tensor
    old: Tensor
    optimality: Tensor
    start: Tensor | None = None


class NftLoss:
    """A `Loss`.

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

    def __call__(self, velocity: Tensor, steps: Tensor, known: NftKnown) -> tuple[Tensor, dict[str, Tensor]]:
        sigma = self._sigma[steps.to(velocity.device)]
        new, old, flow = (v.float() for v in (velocity, known.old, known.flow))
        plus = self._beta * new + (1 - self._beta) * old
        minus = (1 + self._beta) * old - self._beta * new
        good = known.optimality
        policy = good * self._error(plus - flow, sigma) + (1 - good) * self._error(minus - flow, sigma)
        policy = self.SCALE * policy / self._beta
        distance = torch.zeros_like(policy) if known.start is None else velocity_error(velocity, known.start)
        return policy + self._kl * distance, {"policy": policy, "start_distance": distance}

    def _error(self, difference: Tensor, sigma: Tensor) -> Tensor:
        """Self-normalised squared error of the predicted image, which is off by sigma * difference: [b]."""
        off = sigma.view(-1, *[1] * (difference.ndim - 1)) * difference
        size = off.detach().abs().double().flatten(1).mean(1).clamp_min(self.SMALLEST)
        return off.square().flatten(1).mean(1) / size.float()


class NftTrainer(RLTrainer[PerState, NftKnown]):
    """Images of the old policy are noised afresh and trained on; the old policy then follows the trained one."""

    def __init__(self, parts: Components) -> None:
        super().__init__(parts)
        assert isinstance(self._config.teach, NftSection)
        self._nft = self._config.teach
        self._old_policy = WeightSnapshot(parts.student, OLD_POLICY)
        self.losses = {
            size: NftLoss(self._nft, sampler.sigmas, parts.group.device) for size, sampler in self._samplers.items()
        }

    @property
    def _old(self) -> WeightSnapshot:
        return self._old_policy

    def _keep(
        self, index: int, share: Share, trajectory: Trajectory, batch: TaskBatch
    ) -> tuple[TrajectoryBuffer, PerState]:
        """The images, noised afresh, and the flow at each state."""
        noised = self._noised(index, share, trajectory.final, batch)
        return self._buffer(share, noised.states, batch), PerState(noised.flow)

    def _known(
        self, kept: PerState, advantages: Tensor, old: PerPair | None, start: PerPair | None
    ) -> Columns[NftKnown]:
        good = self._per_sample(optimality(advantages, self._nft.advantage_clip, self._nft.optimality))
        return Columns(NftKnown, named(flow=kept, old=old, optimality=good, start=start))

    def _after_steps(self, index: int) -> None:
        """The old policy moves towards the trained one."""
        settings, steps = self._nft.old_policy, (index + 1) * self._config.steps_per_round
        self._old_policy.follow(min(settings.rate * max(0, steps - settings.start), settings.maximum))
