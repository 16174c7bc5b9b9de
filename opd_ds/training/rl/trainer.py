"""A round of reinforcement learning: rollouts, rewards beside them, advantages, accumulated loss, step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from opd_ds.config.algorithms import TeachConfig
from opd_ds.diffusion import Coefficients
from opd_ds.diffusion.rollout import Keep, Trajectory, chunks
from opd_ds.engine import START, WeightSnapshot
from opd_ds.training.buffer import Columns, PerPair, PerSample, TrajectoryBuffer
from opd_ds.training.meter import RoundMeter
from opd_ds.training.rl.judging import GroupJudge
from opd_ds.training.trainer import BufferedTrainer, Components, Experience, Saved, TaskBatch, TrainingData
from opd_ds.utils.transfer import to_device

Kept = TypeVar("Kept")  # what an algorithm keeps of every state
Known = TypeVar("Known")  # what its loss knows of a micro-batch


@dataclass(frozen=True)
class Rollouts:
    """One task's trajectories of a round on this rank, and their scores, which are under way."""

    trajectory: Trajectory
    scores: list[Future[Tensor]]


class RLTrainer(BufferedTrainer, Generic[Kept, Known]):
    """What algorithms that learn from rewards have in common.

    The start, and the old policy where there is one, are copies of the trained weights (`WeightSnapshot`) that take
    their place in the network for rollouts and queries: one network, any ZeRO stage, LoRA or full.
    """

    keeps_transitions = False

    def __init__(self, parts: Components) -> None:
        super().__init__(parts)
        self._config: TeachConfig = parts.config
        rewards = {task: section.rewards for task, section in self._config.tasks.items()}
        self._judge = GroupJudge(parts.group, parts.rewards, rewards, self._config.teach)
        self._start = WeightSnapshot(parts.student, START) if self._config.teach.kl else None

    @property
    def saved(self) -> Sequence[Saved]:
        return [*super().saved, *(copy for copy in (self._old, self._start) if copy is not None)]

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
            scored = {task: self._judge.scored(task, batches[task], rollouts[task].scores, meter) for task in batches}
        data = {
            task: TrainingData(
                replace(buffer, weights=scored[task].weights),
                self._known(kept[task][1], scored[task].advantages, olds.get(task), starts.get(task)),
                [float(count) * buffer.chosen.shape[1] for count in scored[task].counts],
            )
            for task, buffer in buffers.items()
        }
        scores = {name: value for one in scored.values() for name, value in one.summary.items()}
        return Experience(batches, data, {task: rolled.trajectory.final for task, rolled in rollouts.items()}, scores)

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
        guidance, table = self._config.student_guidance(task), self._table(index)
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
            pending.append(self._judge.submit(task, part.final, batch, rows))
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

    def _per_sample(self, values: Tensor) -> PerSample:
        return PerSample(to_device(values.float(), self._group.device))
