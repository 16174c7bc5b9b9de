"""On-policy distillation (DiffusionOPD, arXiv 2605.15055): the task's teacher is asked at the states visited."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.diffusion.rollout import Keep, MicroBatch, Rows, Trajectory, in_step
from opd_ds.errors import UserError
from opd_ds.models import Conditioning, GuidedVelocity, ModelFamily
from opd_ds.training.buffer import Columns, PerPair, PerState, TrajectoryBuffer, named
from opd_ds.training.late import WaitingRound
from opd_ds.training.meter import RoundMeter
from opd_ds.training.objectives import ClosedFormLoss, TeacherVelocities
from opd_ds.training.trainer import BufferedTrainer, Components, Experience, Saved, TaskBatch, TrainingData


@dataclass(frozen=True)
class RolloutGroup:
    """Tasks that are rolled out together, as they share one student guidance: a step is one forward for all of them.

    Attributes:
        rows: of each task, one after the other.
        parts: the micro-batches of the rollout, with as many forwards on every rank.
    """

    guidance: float
    rows: dict[str, slice]
    cond: Conditioning
    noise: SampleNoise
    parts: list[MicroBatch]

    @property
    def sizes(self) -> list[int]:
        return [rows.stop - rows.start for rows in self.rows.values()]

    def of(self, task: str, rows: Rows) -> slice:
        """What of `rows` is the task's, counted from the start of `rows`; it may be empty."""
        own = self.rows[task]
        return slice(bisect_left(rows.host, own.start), bisect_left(rows.host, own.stop))


def rollout_groups(config: DistilConfig, index: int, batches: dict[str, TaskBatch], world: World) -> list[RolloutGroup]:
    """The tasks of round `index` by student guidance. Where nobody looks at the images, every sample's rollout ends at
    its last trained step.
    """
    together: dict[float, list[str]] = {}
    for task in batches:
        together.setdefault(config.student_guidance(task), []).append(task)
    groups = []
    for guidance, tasks in together.items():
        ends = list(accumulate(len(batches[task].part) for task in tasks))
        rows = {task: slice(end - len(batches[task].part), end) for task, end in zip(tasks, ends, strict=True)}
        cond = Conditioning.cat([batches[task].cond for task in tasks])
        noise = SampleNoise.cat([batches[task].noise for task in tasks])
        by_task = [batches[task].last_steps(world.size) for task in tasks]
        last = [list(chain.from_iterable(own)) for own in zip(*by_task, strict=True)]
        taken = [list(map(config.steps_until_trained, own)) for own in last]
        parts = in_step(taken, config.rollout.micro_batch, world.rank)
        if config.shows_rollouts(index):
            parts = [part.whole(config.rollout.steps) for part in parts]
        groups.append(RolloutGroup(guidance, rows, cond, noise, parts))
    return groups


class Distillation(BufferedTrainer):
    """Rounds of several teachers into one student, by the closed form."""

    loss: ClosedFormLoss
    loss_class: type[ClosedFormLoss] = ClosedFormLoss
    known_class: type[TeacherVelocities] = TeacherVelocities
    keeps_transitions = False

    def __init__(self, parts: Components) -> None:
        super().__init__(parts)
        self._config: DistilConfig = parts.config
        self._teachers = parts.teachers
        self.loss = self.loss_class(self._config, self._coefficients, self._sigmas, parts.group.device)
        late = self._config.scoring.late
        self._waiting = WaitingRound(self._draw, self._buffer, self.known_class, parts.group.device) if late else None

    @property
    def saved(self) -> Sequence[Saved]:
        return [*super().saved, *([self._waiting] if self._waiting is not None else [])]

    def _see(self, index: int, meter: RoundMeter) -> Experience[Any]:
        """With `scoring.late` the next round is seen before this one trains, by weights one round older than its
        turn will find; the first round sees itself, too.
        """
        if self._waiting is None:
            return super()._see(index, meter)
        seen = self._waiting.take(index) or super()._see(index, meter)
        if index + 1 < self._config.run.rounds:
            self._waiting.put(index + 1, super()._see(index + 1, meter))
        return seen

    def _collect(self, index: int, batches: dict[str, TaskBatch], meter: RoundMeter) -> Experience[TeacherVelocities]:
        with ExitStack() as stack:
            with meter.phase("rollout"):
                stack.enter_context(self._teachers.gathered())  # for both
                trajectories = self._roll_out_tasks(index, batches, meter)
            return self._score(index, trajectories, batches, meter)

    def _score(
        self, index: int, trajectories: dict[str, Trajectory], batches: dict[str, TaskBatch], meter: RoundMeter
    ) -> Experience[TeacherVelocities]:
        """What the frozen networks say at the states that were visited in round `index`."""
        buffers = {task: self._buffer(trajectories[task].states, batch) for task, batch in batches.items()}
        with meter.phase("score"):
            said = self._query(buffers, meter)
        data = {
            task: TrainingData(
                buffers[task], self._known(task, trajectories[task], said[task]), [batch.pairs] * batch.updates
            )
            for task, batch in batches.items()
        }
        shown = trajectories if self._config.shows_rollouts(index) else {}
        return Experience(batches, data, {task: trajectory.final for task, trajectory in shown.items()})

    def _roll_out_tasks(self, index: int, batches: dict[str, TaskBatch], meter: RoundMeter) -> dict[str, Trajectory]:
        """The student's own trajectories in round `index`, by task."""
        found: dict[str, Trajectory] = {}
        with self._student.gathered() as student:
            for group in rollout_groups(self._config, index, batches, self._group.world):
                chosen = torch.cat([batches[task].chosen for task in group.rows])
                keep = Keep(chosen, self._family.dtype, self.keeps_transitions)
                rolled = self._roll_out(
                    student, group.cond, group.noise, group.guidance, meter, parts=group.parts, keep=keep
                )
                found |= zip(group.rows, rolled.split(group.sizes), strict=True)
        return {task: found[task] for task in batches}

    @classmethod
    def check(cls, config: DistilConfig, family: ModelFamily) -> None:
        super().check(config, family)
        check_branches(config, family)

    def _losses(self, predicted: GuidedVelocity, steps: Tensor, known: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(predicted.velocity, steps, known, predicted.branches)

    def _query(self, buffers: dict[str, TrajectoryBuffer], meter: RoundMeter) -> dict[str, dict[str, Said]]:
        """By task, what each of its frozen networks says of all its pairs (see `DistilConfig.asked`). One network after
        the other, so that one which travels does so once.
        """
        asking: dict[str, list[str]] = {}
        for task in buffers:
            for name in self._config.asked(task):
                asking.setdefault(name, []).append(task)
        names = self._teachers.in_turn(asking)
        found: dict[str, dict[str, Said]] = {task: {} for task in buffers}
        for name, then in zip_longest(names, names[1:]):
            with self._teachers.active(name) as network:
                if then is not None:
                    self._teachers.prefetch(then)
                for task in asking[name]:
                    guidance = self._config.asked(task)[name]
                    if name in self._config.kept_apart(task, self._family.passes):
                        found[task][name] = self._query_branches(network, buffers[task], guidance, meter)
                    else:
                        found[task][name] = Said(self._query_frozen(network, buffers[task], guidance, meter))
        return found

    def _query_branches(self, network: Any, buffer: TrajectoryBuffer, guidance: float, meter: RoundMeter) -> Said:
        """`_query_frozen` with what guidance made the velocities of."""

        def say(x: Tensor, sigma: Tensor, cond: Conditioning, stage: int) -> Tensor:
            predicted = self._predict(network, x, sigma, cond, guidance, meter, stage)
            assert predicted.branches is not None
            return torch.cat([predicted.velocity[:, None], predicted.branches], 1)

        values = self._ask(buffer, say)
        return Said(PerPair(values[:, 0]), PerPair(values[:, 1:]))

    def _known(self, task: str, trajectory: Trajectory, said: Mapping[str, Said]) -> Columns[TeacherVelocities]:
        """What the loss knows of one task's pairs."""
        velocity, noise = (None if v is None else PerState(v) for v in (trajectory.velocity, trajectory.noise))
        roles = self._config.roles(task)
        guided = {role: said[name].guided for role, name in roles.items()}
        branches = {f"{role}_branches": said[name].branches for role, name in roles.items()}
        return Columns(self.known_class, named(velocity=velocity, noise=noise, **guided, **branches))


@dataclass(frozen=True)
class Said:
    """What a frozen network said of one task's pairs: `guided` velocities, and what guidance made them of, where that
    is kept.
    """

    guided: PerPair
    branches: PerPair | None = None


def check_branches(config: DistilConfig, family: ModelFamily) -> None:
    """Raise UserError where branches of guidance are to be compared in a family that has none."""
    if config.objective.guided == "apart" and family.embedded_guidance:
        raise UserError(
            f"objective.guided = 'apart': model.family = {config.model.family!r} takes the guidance as an input of its "
            "network, in one pass, so there are no two branches; set it to 'together'"
        )
