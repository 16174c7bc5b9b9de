"""Distillation and rewards in one loss (`reward_term`): the pairs that are distilled are also weighed by their image's
reward, in the same forward.

The distillation's loss of a pair is added to `reward_term.weight` times GRPO-Guard's of the transition that was drawn
there (`grpo_guard.py`), with advantages within the images of one prompt. A pair of an image without a score, and a step
without noise, have the distillation's part only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd_ds.config.algorithms import DistilConfig
from opd_ds.diffusion import Coefficients, kernel
from opd_ds.diffusion.rollout import Trajectory, chunks
from opd_ds.errors import UserError
from opd_ds.models import ModelFamily
from opd_ds.training.asking import VisitedStates
from opd_ds.training.buffer import Columns, PerSample
from opd_ds.training.distillation import Distillation
from opd_ds.training.meter import RoundMeter
from opd_ds.training.objectives import ClosedFormLoss, DrawnTransitions, TeacherVelocities
from opd_ds.training.rl.grpo_guard import GrpoGuardPolicy, trained_by_any_round
from opd_ds.training.rl.judging import GroupJudge, Scored
from opd_ds.training.shares import Share, TaskBatch, by_task
from opd_ds.training.trainer import Components, Experience
from opd_ds.utils.transfer import to_device


@dataclass(frozen=True)
class RewardedTransitions(DrawnTransitions):
    """The same with the `advantage` of each pair's image [b], and its `share` [b]: 0 without a score, else the images
    of its update over those of them that have one, so that the mean over all is the mean over these.
    """

    advantage: Tensor | None = None
    share: Tensor | None = None


class RewardedLoss(ClosedFormLoss):
    """The distillation's loss, plus `reward_term.weight` times the policy's. A `Loss`."""

    def __init__(self, config: DistilConfig, coefficients: Coefficients, sigmas: Tensor, device: torch.device) -> None:
        super().__init__(config, coefficients, sigmas, device)
        assert config.reward_term is not None
        self._weight = config.reward_term.weight
        trained = trained_by_any_round(config, coefficients.std)
        self._policy = GrpoGuardPolicy(config.reward_term, coefficients, sigmas, trained, device)

    @property
    def measures(self) -> tuple[str, ...]:
        return (*super().measures, *GrpoGuardPolicy.measures)

    def __call__(
        self, velocity: Tensor, steps: Tensor, known: TeacherVelocities, branches: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(known, RewardedTransitions)
        assert known.velocity is not None
        assert known.noise is not None
        assert known.advantage is not None
        assert known.share is not None
        loss, measured = super().__call__(velocity, steps, known, branches)
        policy, more = self._policy(velocity, steps.to(velocity.device), known.velocity, known.noise, known.advantage)
        more = {name: known.share * value for name, value in more.items()}
        return loss + self._weight * known.share * policy, measured | more


class RewardedDistillation(Distillation):
    """Images are scored while the teachers are asked."""

    loss_class = RewardedLoss
    known_class = RewardedTransitions
    keeps_transitions = True

    @classmethod
    def check(cls, config: Any, family: ModelFamily) -> None:
        """Refuse trained steps none of which draws noise."""
        super().check(config, family)
        rollout = config.rollout
        std = kernel(rollout.kernel, rollout.noise_level).coefficients(family.sigmas(rollout.steps)).std
        if not any(std[step] > 0 for step in trained_by_any_round(config, std)):
            raise UserError(
                f"rollout.kernel = {rollout.kernel!r} draws no noise on any step that rollout.trained_steps trains, so "
                "reward_term has nothing to learn from; train other steps, or leave reward_term out"
            )

    def __init__(self, parts: Components) -> None:
        super().__init__(parts)
        assert self._config.reward_term is not None
        self._term = self._config.reward_term
        rewards = {task: section.rewards for task, section in self._config.tasks.items()}
        self._judge = GroupJudge(parts.group, parts.rewards, rewards, self._term)

    def _score(
        self,
        index: int,
        trajectories: dict[Share, Trajectory],
        batches: dict[Share, TaskBatch],
        meter: RoundMeter,
        visited: VisitedStates | None,
    ) -> Experience[TeacherVelocities]:
        pending = {
            share: [
                self._judge.submit(share.task, trajectory.final[rows], batches[share], rows)
                for rows in chunks(len(trajectory.final), self._config.rollout.micro_batch)
            ]
            for share, trajectory in trajectories.items()
        }
        seen = super()._score(index, trajectories, batches, meter, visited)
        with meter.phase("rewards"):
            scored = {
                task: self._judge.scored(
                    task, [batches[share] for share in shares], [pending[share] for share in shares], meter
                )
                for task, shares in by_task(batches).items()
            }
        data = {
            share: replace(one, known=self._with_rewards(one.known, share, batches[share], scored[share.task]))
            for share, one in seen.data.items()
        }
        scores = {name: value for one in scored.values() for name, value in one.summary.items()}
        return replace(seen, data=data, scores=scores)

    def _with_rewards(
        self, known: Columns[TeacherVelocities], share: Share, batch: TaskBatch, scored: Scored
    ) -> Columns[TeacherVelocities]:
        clip = self._term.advantage_clip
        of_update = batch.part.total / batch.updates / scored.counts[share.update]
        columns = {
            "advantage": scored.advantages_of(batch.part).clamp(-clip, clip),
            "share": scored.weights(batch.part) * of_update,
        }
        device = self._group.device
        rewarded = {name: PerSample(to_device(values.float(), device)) for name, values in columns.items()}
        return replace(known, columns={**known.columns, **rewarded})
