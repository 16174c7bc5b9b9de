"""GRPO-Guard (arXiv 2510.22319) on Flow-GRPO (arXiv 2505.05470): policy gradient over the transitions of SDE rollouts.

A transition that drew eps has, under the policy in training, the log-ratio mean(D eps) / std - mean(D^2) / (2 std^2)
with D = mean - mean_old. Its mean is below 0 and its size depends on the step through std, so that good samples never
reach the upper clip while bad ones reach the lower. GRPO-Guard takes mean(D eps) for it: zero mean, one scale.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd_ds.config.rl import GuardSection, RatioSection
from opd_ds.config.schema import RunConfig
from opd_ds.data import Size
from opd_ds.diffusion import Coefficients, clipped_surrogate, kernel, kl_weight, log_ratio, velocity_error
from opd_ds.diffusion.noise import sample_seed
from opd_ds.diffusion.rollout import Trajectory
from opd_ds.errors import UserError
from opd_ds.models import ModelFamily
from opd_ds.training.buffer import Columns, PerPair, PerState, TrajectoryBuffer, named
from opd_ds.training.rl.trainer import RLTrainer
from opd_ds.training.shares import Sampler, Share, TaskBatch
from opd_ds.training.steps import choose_steps
from opd_ds.training.trainer import Components


@dataclass(frozen=True)
class Transitions:
    """Of every state: the velocity that drew the next one, and the noise."""

    velocity: PerState
    noise: PerState


@dataclass(frozen=True)
class GrpoGuardKnown:
    """Of a micro-batch of pairs: `velocity` (the old policy's), `noise` and, with a KL, `start` [b, C, ...]; and
    `advantage` [b].
    """

    velocity: Tensor
    noise: Tensor
    advantage: Tensor
    start: Tensor | None = None


class GrpoGuardPolicy:
    """The clipped surrogate of transitions, 0 on steps that draw no noise: these have no likelihood.

    Args:
        coefficients, sigmas: of the stochastic kernel on the sampler's grid.
        trained: the steps that a round may train; weights of steps have mean 1 over those of them that draw noise.
    """

    measures = ("policy", "ratio", "clipped")

    def __init__(
        self,
        settings: RatioSection,
        coefficients: Coefficients,
        sigmas: Tensor,
        trained: Collection[int],
        device: torch.device,
    ) -> None:
        self._clip, self._normalized = settings.clip, settings.ratio == "normalized"
        noisy = coefficients.std > 0
        weights = noisy.double()
        if settings.step_weighting == "inverse_dt":
            weights = weights / (sigmas[:-1] - sigmas[1:]).double()
            weights = weights / weights[[step for step in sorted(trained) if noisy[step]]].mean()
        std = torch.where(noisy, coefficients.std, 1.0)
        self._weights, self._b, self._std = (
            table.to(device, torch.float32) for table in (weights, coefficients.b, std)
        )

    def __call__(
        self, velocity: Tensor, steps: Tensor, drawn: Tensor, noise: Tensor, advantage: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`velocity`, `drawn` (what drew the transition) and its `noise` [b, C, ...], `steps` int64 and `advantage`
        [b], on one device, to the loss of each pair [b], and by name what is measured of it.
        """
        along, plain = log_ratio(velocity, drawn, noise, self._b[steps], self._std[steps])
        ratio = (along if self._normalized else plain).exp()
        policy = self._weights[steps] * clipped_surrogate(ratio, advantage, self._clip)
        beyond = torch.where(advantage > 0, ratio > 1 + self._clip, ratio < 1 - self._clip).float()
        return policy, {"policy": policy, "ratio": ratio, "clipped": beyond}


class GrpoGuardLoss:
    """A `Loss`.

    Args:
        coefficients, sigmas, trained: as `GrpoGuardPolicy` takes them.
    """

    measures = (*GrpoGuardPolicy.measures, "start_kl")

    def __init__(
        self,
        settings: GuardSection,
        coefficients: Coefficients,
        sigmas: Tensor,
        trained: Collection[int],
        device: torch.device,
    ) -> None:
        self._policy = GrpoGuardPolicy(settings, coefficients, sigmas, trained, device)
        self._kl_factor, self._kl = settings.kl, kl_weight(coefficients).to(device, torch.float32)

    def __call__(self, velocity: Tensor, steps: Tensor, known: GrpoGuardKnown) -> tuple[Tensor, dict[str, Tensor]]:
        steps = steps.to(velocity.device)
        loss, measured = self._policy(velocity, steps, known.velocity, known.noise, known.advantage)
        kl = torch.zeros_like(loss)
        if known.start is not None:
            kl = self._kl[steps] * velocity_error(velocity, known.start)
            loss = loss + self._kl_factor * kl
        return loss, measured | {"start_kl": kl}


def trained_by_any_round(config: RunConfig, std: Tensor) -> set[int]:
    """The steps that some round may train; `std` [T] of the sampler."""
    rollout = config.rollout
    if config.algorithm.trained_window is not None:
        return {step for step, value in enumerate(std.tolist()) if value > 0}
    if rollout.trained_steps.queries is not None:
        return set(range(rollout.steps))
    return set(choose_steps(rollout.trained_steps, rollout.steps, config.run.seed, 0, "", [0])[0].tolist())


class GrpoGuardTrainer(RLTrainer[Transitions, GrpoGuardKnown]):
    """The transitions are trained on as they were drawn."""

    keeps_transitions = True

    @classmethod
    def check(cls, config: Any, family: ModelFamily) -> None:
        """Refuse trained steps that draw no noise: they have no likelihood to learn from."""
        super().check(config, family)
        rollout = config.rollout
        std = kernel(rollout.kernel, rollout.noise_level).coefficients(family.sigmas(rollout.steps)).std
        still = {step for step, value in enumerate(std.tolist()) if value == 0}
        if config.trained_steps > rollout.steps - len(still):
            raise UserError(
                f"rollout.kernel = {rollout.kernel!r} draws noise on {rollout.steps - len(still)} of its "
                f"{rollout.steps} steps, fewer than are to be trained ({config.trained_steps})"
            )
        trained = trained_by_any_round(config, std)
        if still & trained:
            raise UserError(
                f"rollout.kernel = {rollout.kernel!r} draws no noise on step {min(still & trained)}, which "
                "rollout.trained_steps trains; give the others, as in trained_steps: {fraction: 0.99}"
            )

    def __init__(self, parts: Components) -> None:
        super().__init__(parts)
        assert isinstance(self._config.teach, GuardSection)
        self._guard = self._config.teach
        self.losses = {}
        for size, sampler in self._samplers.items():
            trained = trained_by_any_round(self._config, sampler.coefficients.std)
            self.losses[size] = GrpoGuardLoss(
                self._guard, sampler.coefficients, sampler.sigmas, trained, parts.group.device
            )

    def _keep(
        self, index: int, share: Share, trajectory: Trajectory, batch: TaskBatch
    ) -> tuple[TrajectoryBuffer, Transitions]:
        assert trajectory.velocity is not None
        assert trajectory.noise is not None
        kept = Transitions(PerState(trajectory.velocity), PerState(trajectory.noise))
        return self._buffer(share, trajectory.states, batch), kept

    def _known(
        self, kept: Transitions, advantages: Tensor, old: PerPair | None, start: PerPair | None
    ) -> Columns[GrpoGuardKnown]:
        clip = self._guard.advantage_clip
        advantage = self._per_sample(advantages.clamp(-clip, clip))
        return Columns(
            GrpoGuardKnown, named(velocity=kept.velocity, noise=kept.noise, advantage=advantage, start=start)
        )

    # ---- the steps that draw noise ----

    def _window(self, index: int) -> range | None:
        """The round's stochastic steps; None: all of them."""
        length = self._guard.window
        if length is None:
            return None
        noisy = torch.stack([one.coefficients.std > 0 for one in self._samplers.values()]).all(0).tolist()
        starts = [first for first in range(len(noisy) - length + 1) if all(noisy[first : first + length])]
        generator = torch.Generator().manual_seed(sample_seed(self._config.run.seed, index, "window", 0))
        first = starts[int(torch.randint(len(starts), (), generator=generator))]
        return range(first, first + length)

    def _sampler(self, index: int, size: Size) -> Sampler:
        window, sampler = self._window(index), self._samplers[size]
        if window is None:
            return sampler
        inside = torch.zeros(self._config.rollout.steps, dtype=torch.bool)
        inside[window.start : window.stop] = True
        outside = kernel("euler").coefficients(sampler.sigmas)
        return replace(sampler, coefficients=sampler.coefficients.where(inside, outside))

    def _choose(self, index: int, task: str, samples: list[int]) -> Tensor:
        window = self._window(index)
        if window is None:
            return super()._choose(index, task, samples)
        return torch.arange(window.start, window.stop).expand(len(samples), -1)
