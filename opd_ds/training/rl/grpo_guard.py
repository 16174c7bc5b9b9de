"""GRPO-Guard (arXiv 2510.22319) on Flow-GRPO (arXiv 2505.05470): policy gradient over the transitions of SDE rollouts.

A transition that drew eps has, under the policy in training, the log-ratio mean(D eps) / std - mean(D^2) / (2 std^2)
with D = mean - mean_old. Its mean is below 0 and its size depends on the step through std, so that good samples never
reach the upper clip while bad ones reach the lower. GRPO-Guard takes mean(D eps) for it: zero mean, one scale.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_ds.config.algorithms import TeachConfig
from opd_ds.config.rl import GuardSection
from opd_ds.diffusion import Coefficients, clipped_surrogate, kernel, kl_weight, log_ratio, velocity_error
from opd_ds.diffusion.noise import sample_seed
from opd_ds.diffusion.rollout import Trajectory
from opd_ds.errors import UserError
from opd_ds.models import ModelFamily
from opd_ds.training.buffer import Columns, PerPair, PerState, TrajectoryBuffer, named
from opd_ds.training.rl.trainer import RLTrainer
from opd_ds.training.steps import choose_steps
from opd_ds.training.trainer import Components, TaskBatch


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


class GrpoGuardLoss:
    """A `Loss`.

    Args:
        coefficients, sigmas: of the stochastic kernel on the sampler's grid.
        trained: the steps that a round may train; weights of steps have mean 1 over these.
    """

    measures = ("policy", "ratio", "clipped", "start_kl")

    def __init__(
        self,
        settings: GuardSection,
        coefficients: Coefficients,
        sigmas: Tensor,
        trained: Collection[int],
        device: torch.device,
    ) -> None:
        self._settings = settings
        weights = torch.ones_like(coefficients.b)
        if settings.step_weighting == "inverse_dt":
            weights = 1 / (sigmas[:-1] - sigmas[1:]).double()
            weights = weights / weights[sorted(trained)].mean()
        self._weights, self._b, self._std, self._kl = (
            table.to(device, torch.float32)
            for table in (weights, coefficients.b, coefficients.std, kl_weight(coefficients))
        )

    def __call__(self, velocity: Tensor, steps: Tensor, known: GrpoGuardKnown) -> tuple[Tensor, dict[str, Tensor]]:
        steps, advantage, clip = steps.to(velocity.device), known.advantage, self._settings.clip
        along, plain = log_ratio(velocity, known.velocity, known.noise, self._b[steps], self._std[steps])
        ratio = (along if self._settings.ratio == "normalized" else plain).exp()
        policy = self._weights[steps] * clipped_surrogate(ratio, advantage, clip)
        beyond = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip).float()
        loss, kl = policy, torch.zeros_like(policy)
        if known.start is not None:
            kl = self._kl[steps] * velocity_error(velocity, known.start)
            loss = policy + self._settings.kl * kl
        return loss, {"policy": policy, "ratio": ratio, "clipped": beyond, "start_kl": kl}


def _trained(config: TeachConfig, std: Tensor) -> set[int]:
    """The steps that any round may train; `std` [T] of the sampler."""
    rollout, teach = config.rollout, config.teach
    if isinstance(teach, GuardSection) and teach.window is not None:
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
        trained = _trained(config, std)
        if still & trained:
            raise UserError(
                f"rollout.kernel = {rollout.kernel!r} draws no noise on step {min(still & trained)}, which "
                "rollout.trained_steps trains; give the others, as in trained_steps: {fraction: 0.99}"
            )

    def __init__(self, parts: Components) -> None:
        super().__init__(parts)
        assert isinstance(self._config.teach, GuardSection)
        self._guard = self._config.teach
        trained = _trained(self._config, self._coefficients.std)
        self.loss = GrpoGuardLoss(self._guard, self._coefficients, self._sigmas, trained, parts.group.device)

    def _keep(
        self, index: int, task: str, trajectory: Trajectory, batch: TaskBatch
    ) -> tuple[TrajectoryBuffer, Transitions]:
        assert trajectory.states is not None
        assert trajectory.velocity is not None
        assert trajectory.noise is not None
        buffer = self._buffer(trajectory.states, batch)
        return buffer, Transitions(PerState(trajectory.velocity), PerState(trajectory.noise))

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
        noisy = (self._coefficients.std > 0).tolist()
        starts = [first for first in range(len(noisy) - length + 1) if all(noisy[first : first + length])]
        generator = torch.Generator().manual_seed(sample_seed(self._config.run.seed, index, "window", 0))
        first = starts[int(torch.randint(len(starts), (), generator=generator))]
        return range(first, first + length)

    def _table(self, index: int) -> Coefficients:
        window = self._window(index)
        if window is None:
            return self._coefficients
        inside = torch.zeros(self._config.rollout.steps, dtype=torch.bool)
        inside[window.start : window.stop] = True
        return self._coefficients.where(inside, kernel("euler").coefficients(self._sigmas))

    def _choose(self, index: int, task: str, samples: list[int]) -> Tensor:
        window = self._window(index)
        if window is None:
            return super()._choose(index, task, samples)
        return torch.arange(window.start, window.stop).expand(len(samples), -1)
