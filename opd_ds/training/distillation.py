"""On-policy distillation (DiffusionOPD, arXiv 2605.15055): the task's teacher is asked at the states visited."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Any

import torch
from torch import Tensor

from opd_ds.config.algorithms import DistilConfig
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.diffusion.rollout import Trajectory
from opd_ds.errors import UserError
from opd_ds.models import Conditioning, GuidedVelocity, ModelFamily
from opd_ds.training.buffer import Columns, PerPair, PerState, TrajectoryBuffer, named
from opd_ds.training.meter import RoundMeter
from opd_ds.training.objectives import ClosedFormLoss, TeacherVelocities
from opd_ds.training.trainer import BufferedTrainer, Components, Experience, TaskBatch, TrainingData


@dataclass(frozen=True)
class RolloutGroup:
    """Tasks that are rolled out together, as they share one student guidance: a step is one forward for all of them.

    Attributes:
        rows: of each task, one after the other.
    """

    guidance: float
    rows: dict[str, slice]
    cond: Conditioning
    noise: SampleNoise

    @property
    def sizes(self) -> list[int]:
        return [rows.stop - rows.start for rows in self.rows.values()]

    def of(self, task: str, rows: slice) -> slice:
        """What of `rows` is the task's, counted from the start of `rows`; it may be empty."""
        own = self.rows[task]
        first = max(own.start, rows.start)
        return slice(first - rows.start, max(min(own.stop, rows.stop), first) - rows.start)


def rollout_groups(config: DistilConfig, batches: dict[str, TaskBatch]) -> list[RolloutGroup]:
    """The round's tasks by student guidance."""
    together: dict[float, list[str]] = {}
    for task in batches:
        together.setdefault(config.student_guidance(task), []).append(task)
    groups = []
    for guidance, tasks in together.items():
        ends = list(accumulate(len(batches[task].part) for task in tasks))
        rows = {task: slice(end - len(batches[task].part), end) for task, end in zip(tasks, ends, strict=True)}
        cond = Conditioning.cat([batches[task].cond for task in tasks])
        groups.append(RolloutGroup(guidance, rows, cond, SampleNoise.cat([batches[task].noise for task in tasks])))
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

    def _collect(self, index: int, batches: dict[str, TaskBatch], meter: RoundMeter) -> Experience[TeacherVelocities]:
        with ExitStack() as stack:
            with meter.phase("rollout"):
                stack.enter_context(self._teachers.gathered())  # for both
                trajectories = self._roll_out_tasks(batches, meter)
                buffers = {task: _buffer(trajectories[task], batch) for task, batch in batches.items()}
            with meter.phase("score"):
                said = self._query(buffers, meter)
        data = {
            task: TrainingData(buffers[task], self._known(task, trajectories[task], said[task]), batches[task].pairs)
            for task in batches
        }
        return Experience(data, {task: trajectory.final for task, trajectory in trajectories.items()})

    def _roll_out_tasks(self, batches: dict[str, TaskBatch], meter: RoundMeter) -> dict[str, Trajectory]:
        """The student's own trajectories, by task."""
        found: dict[str, Trajectory] = {}
        with self._student.gathered() as student:
            for group in rollout_groups(self._config, batches):
                rolled = self._roll_out(
                    student, group.cond, group.noise, group.guidance, meter, transitions=self.keeps_transitions
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

        def say(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
            predicted = self._predict(network, x, sigma, cond, guidance, meter)
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


def _buffer(trajectory: Trajectory, batch: TaskBatch) -> TrajectoryBuffer:
    assert trajectory.states is not None
    return TrajectoryBuffer(trajectory.states, batch.chosen, batch.part.weights, batch.cond)
