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
from opd_ds.data import Size
from opd_ds.diffusion.rollout import Keep, Trajectory, chunks
from opd_ds.engine import START, WeightSnapshot
from opd_ds.training.buffer import Columns, PerPair, PerSample, TrajectoryBuffer
from opd_ds.training.meter import RoundMeter
from opd_ds.training.rl.judging import GroupJudge
from opd_ds.training.shares import Sampler, Share, TaskBatch, by_task
from opd_ds.training.trainer import BufferedTrainer, Components, Experience, Saved, TrainingData
from opd_ds.utils.transfer import to_device

Kept = TypeVar("Kept")  # what an algorithm keeps of every state
Known = TypeVar("Known")  # what its loss knows of a micro-batch


@dataclass(frozen=True)
class Rollouts:
    """A share's trajectories of a round on this rank, and their scores, which are under way."""

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

    def _collect(self, index: int, batches: dict[Share, TaskBatch], meter: RoundMeter) -> Experience[Known]:
        olds: dict[Share, PerPair] = {}
        with self._behaviour(), self._student.gathered() as policy:
            with meter.phase("rollout"):
                rollouts = {
                    share: self._roll_out_and_score(index, policy, share, batches[share], meter) for share in batches
                }
                kept = {
                    share: self._keep(index, share, rollouts[share].trajectory, batches[share]) for share in batches
                }
                buffers = {share: buffer for share, (buffer, _) in kept.items()}
            if self._old is not None:
                with meter.phase("score"):
                    olds = self._query(policy, buffers, meter)
        starts = self._query_start(buffers, meter)
        with meter.phase("rewards"):
            scored = {
                task: self._judge.scored(
                    task, [batches[share] for share in shares], [rollouts[share].scores for share in shares], meter
                )
                for task, shares in by_task(batches).items()
            }
        data = {}
        for share, buffer in buffers.items():
            found, part = scored[share.task], batches[share].part
            data[share] = TrainingData(
                replace(buffer, weights=found.weights(part)),
                self._known(kept[share][1], found.advantages_of(part), olds.get(share), starts.get(share)),
                float(found.counts[share.update]) * buffer.chosen.shape[1],
            )
        scores = {name: value for one in scored.values() for name, value in one.summary.items()}
        return Experience(batches, data, {share: rolled.trajectory.final for share, rolled in rollouts.items()}, scores)

    # ---- what algorithms differ in ----

    @property
    def _old(self) -> WeightSnapshot | None:
        """The policy that draws, where it is not the trained one."""
        return None

    def _sampler(self, index: int, size: Size) -> Sampler:
        """The sampler of round `index`."""
        return self._samplers[size]

    @abstractmethod
    def _keep(
        self, index: int, share: Share, trajectory: Trajectory, batch: TaskBatch
    ) -> tuple[TrajectoryBuffer, Kept]:
        """The states that are trained on, and what else is kept of each."""

    @abstractmethod
    def _known(self, kept: Kept, advantages: Tensor, old: PerPair | None, start: PerPair | None) -> Columns[Known]:
        """What the loss knows of a share's pairs. `advantages`: float64 [B], of this rank's samples."""

    # ---- the stages, in order ----

    def _behaviour(self) -> AbstractContextManager[None]:
        """Inside, the network is the policy that draws."""
        return nullcontext() if self._old is None else self._old.swapped_in()

    def _roll_out_and_score(
        self, index: int, policy: Any, share: Share, batch: TaskBatch, meter: RoundMeter
    ) -> Rollouts:
        parts, pending = [], []
        guidance, sampler = self._config.student_guidance(share.task), self._sampler(index, share.size)
        for rows in chunks(len(batch.part), self._config.rollout.micro_batch):
            part = self._roll_out(
                policy,
                batch.cond[rows],
                batch.noise[rows],
                sampler,
                guidance,
                meter,
                keep=Keep(batch.chosen[rows], self._family.dtype, transitions=True) if self.keeps_transitions else None,
            )
            parts.append(part)
            pending.append(self._judge.submit(share.task, part.final, batch, rows))
        return Rollouts(Trajectory.cat(parts), pending)

    def _query(self, network: Any, buffers: dict[Share, TrajectoryBuffer], meter: RoundMeter) -> dict[Share, PerPair]:
        return {
            share: self._query_frozen(network, buffer, self._config.student_guidance(share.task), meter)
            for share, buffer in buffers.items()
        }

    def _query_start(self, buffers: dict[Share, TrajectoryBuffer], meter: RoundMeter) -> dict[Share, PerPair]:
        """The start's velocities; nothing where distance to it costs nothing."""
        if self._start is None:
            return {}
        with meter.phase("score"), self._start.swapped_in(), self._student.gathered() as start:
            return self._query(start, buffers, meter)

    def _per_sample(self, values: Tensor) -> PerSample:
        return PerSample(to_device(values.float(), self._group.device))
