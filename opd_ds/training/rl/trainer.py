"""A round of reinforcement learning: rollouts, rewards beside them, advantages, accumulated loss, step."""

from __future__ import annotations

import logging
from abc import abstractmethod
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from opd_ds.config.algorithms import TeachConfig
from opd_ds.diffusion import Coefficients
from opd_ds.diffusion.rollout import Keep, Trajectory, chunks
from opd_ds.engine import START, WeightSnapshot
from opd_ds.errors import UserError
from opd_ds.training.buffer import Columns, PerPair, PerSample, TrajectoryBuffer
from opd_ds.training.meter import RoundMeter
from opd_ds.training.rl.advantages import equal_groups, group_advantages, weighted_sum
from opd_ds.training.rl.reward_worker import RewardScorer
from opd_ds.training.trainer import BufferedTrainer, Components, Experience, TaskBatch, TrainingData
from opd_ds.utils.transfer import to_device

_SAID_AGAIN = 50  # rounds

Kept = TypeVar("Kept")  # what an algorithm keeps of every state
Known = TypeVar("Known")  # what its loss knows of a micro-batch


@dataclass(frozen=True)
class Rollouts:
    """One task's trajectories of a round on this rank, and their scores, which are under way."""

    trajectory: Trajectory
    scores: list[Future[Tensor]]


@dataclass(frozen=True)
class Scored:
    """What the rewards of all ranks say of one task's samples.

    Attributes:
        advantages: float64 [B], of this rank's samples, unclipped.
        weights: float32 [B], 0 where a sample does not count.
        counts: of the samples that have a score, over all ranks, in each of the round's updates.
        summary: for the metrics, by name.
    """

    advantages: Tensor
    weights: Tensor
    counts: list[int]
    summary: dict[str, float]


class RLTrainer(BufferedTrainer, Generic[Kept, Known]):
    """What algorithms that learn from rewards have in common.

    The start, and the old policy where there is one, are copies of the trained weights (`WeightSnapshot`) that take
    their place in the network for rollouts and queries: one network, any ZeRO stage, LoRA or full.
    """

    keeps_transitions = False

    def __init__(self, parts: Components) -> None:
        super().__init__(parts)
        self._config: TeachConfig = parts.config
        self._scorer = RewardScorer(parts.rewards, self._config.teach.reward_attempts)
        self._equal_rounds: dict[str, int] = {}  # by task, up to now
        self._start = WeightSnapshot(parts.student, START) if self._config.teach.kl else None

    @property
    def snapshots(self) -> list[WeightSnapshot]:
        return [*super().snapshots, *(copy for copy in (self._old, self._start) if copy is not None)]

    def _collect(self, index: int, batches: dict[str, TaskBatch], meter: RoundMeter) -> Experience[Known]:
        olds: dict[str, PerPair] = {}
        with self._behaviour(), self._student.gathered() as policy:
            with meter.phase("rollout"):
                rollouts = {
                    task: self._roll_out_and_score(index, policy, task, batches[task], meter) for task in batches
                }
                kept = {task: self._keep(index, task, rollouts[task].trajectory, batches[task]) for task in batches}
                buffers = {task: buffer for task, (buffer, _) in kept.items()}
            if self._old is not None:
                with meter.phase("score"):
                    olds = self._query(policy, buffers, meter)
        starts = self._query_start(buffers, meter)
        with meter.phase("rewards"):
            scored = {task: self._scored(task, batches[task], rollouts[task].scores, meter) for task in batches}
        data = {
            task: TrainingData(
                replace(buffer, weights=scored[task].weights),
                self._known(kept[task][1], scored[task].advantages, olds.get(task), starts.get(task)),
                [float(count) * buffer.chosen.shape[1] for count in scored[task].counts],
            )
            for task, buffer in buffers.items()
        }
        scores = {name: value for one in scored.values() for name, value in one.summary.items()}
        return Experience(data, {task: rolled.trajectory.final for task, rolled in rollouts.items()}, scores)

    # ---- what algorithms differ in ----

    @property
    def _old(self) -> WeightSnapshot | None:
        """The policy that draws, where it is not the trained one."""
        return None

    def _table(self, index: int) -> Coefficients:
        """The sampler's table in round `index`."""
        return self._coefficients

    @abstractmethod
    def _keep(self, index: int, task: str, trajectory: Trajectory, batch: TaskBatch) -> tuple[TrajectoryBuffer, Kept]:
        """The states that are trained on, and what else is kept of each."""

    @abstractmethod
    def _known(self, kept: Kept, advantages: Tensor, old: PerPair | None, start: PerPair | None) -> Columns[Known]:
        """What the loss knows of one task's pairs. `advantages`: float64 [B], of this rank's samples."""

    # ---- the stages, in order ----

    def _behaviour(self) -> AbstractContextManager[None]:
        """Inside, the network is the policy that draws."""
        return nullcontext() if self._old is None else self._old.swapped_in()

    def _roll_out_and_score(self, index: int, policy: Any, task: str, batch: TaskBatch, meter: RoundMeter) -> Rollouts:
        parts, pending = [], []
        rewards, guidance = self._config.tasks[task].rewards, self._config.student_guidance(task)
        table = self._table(index)
        for rows in chunks(len(batch.part), self._config.rollout.micro_batch):
            part = self._roll_out(
                policy,
                batch.cond[rows],
                batch.noise[rows],
                guidance,
                meter,
                keep=Keep(batch.chosen[rows], self._family.dtype, transitions=True) if self.keeps_transitions else None,
                coefficients=table,
            )
            parts.append(part)
            pending.append(self._scorer.submit(rewards, part.final, batch.prompts[rows], batch.metadata[rows]))
        return Rollouts(Trajectory.cat(parts), pending)

    def _query(self, network: Any, buffers: dict[str, TrajectoryBuffer], meter: RoundMeter) -> dict[str, PerPair]:
        return {
            task: self._query_frozen(network, buffer, self._config.student_guidance(task), meter)
            for task, buffer in buffers.items()
        }

    def _query_start(self, buffers: dict[str, TrajectoryBuffer], meter: RoundMeter) -> dict[str, PerPair]:
        """The start's velocities; nothing where distance to it costs nothing."""
        if self._start is None:
            return {}
        with meter.phase("score"), self._start.swapped_in(), self._student.gathered() as start:
            return self._query(start, buffers, meter)

    def _scored(self, task: str, batch: TaskBatch, pending: list[Future[Tensor]], meter: RoundMeter) -> Scored:
        """Rewards of all ranks to what each sample is worth. Collective.

        Raises:
            UserError: not one image of the round could be scored.
        """
        rewards = self._config.tasks[task].rewards
        mine = RewardScorer.collect(pending, lambda: meter.heartbeat(f", waiting for the rewards of {task}"))
        scores = torch.full((batch.part.total, len(rewards)), torch.nan, dtype=torch.float64)
        # A sample that only pads a rank's part is another rank's too, and counts there.
        own = batch.part.weights > 0
        indices = torch.tensor(batch.part.indices)
        for places, values in self._group.gather((indices[own], mine[own])):
            scores[places] = values
        total = weighted_sum(scores, [reward.weight for reward in rewards], self._config.teach.reward_scale)
        finite = torch.isfinite(total)
        counts = finite.view(batch.updates, -1).sum(1).tolist()
        if not all(counts):
            images = f"{len(total) // len(counts)} images" + (" of an update" if len(counts) > 1 else "")
            raise UserError(
                f"round {meter.round_number}: the rewards of task {task} scored none of its {images} in "
                f"{self._config.teach.reward_attempts} attempts (see the log above); the last checkpoint is intact, go "
                "on with --resume auto when they work again"
            )
        good = total[finite]
        group = self._config.teach.group
        equal = equal_groups(total, group)
        self._say_what_teaches_nothing(task, meter.round_number, all_equal=equal * group == len(total))
        summary = {
            f"{task}/mean": float(good.mean()),
            f"{task}/std": float(good.std(correction=0)),
            f"{task}/left_out": float(len(total) - len(good)),
            f"{task}/equal_groups": float(equal),
        }
        for reward, column in zip(rewards, scores.T, strict=True):
            summary[f"{task}/{reward.label}"] = float(column.nanmean())
        advantages = group_advantages(total, group, self._config.teach.advantage_std)
        return Scored(advantages[indices], batch.part.weights * finite[indices], counts, summary)

    def _say_what_teaches_nothing(self, task: str, round_number: int, *, all_equal: bool) -> None:
        """At the first of several rounds in a row, and now and then after that."""
        before = self._equal_rounds.get(task, 0)
        self._equal_rounds[task] = before + 1 if all_equal else 0
        if all_equal and before % _SAID_AGAIN == 0 and self._group.world.is_main:
            logging.getLogger("opd_ds").warning(
                "round %d: task %s: the images of each prompt have equal rewards, so nothing is learned from them "
                "(%d rounds in a row); can %s tell such images apart?",
                round_number, task, before + 1, " + ".join(one.label for one in self._config.tasks[task].rewards),
            )  # fmt: skip

    def _per_sample(self, values: Tensor) -> PerSample:
        return PerSample(to_device(values.float(), self._group.device))
