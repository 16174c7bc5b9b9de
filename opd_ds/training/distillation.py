"""On-policy distillation (DiffusionOPD, arXiv 2605.15055): the task's teacher is asked at the states visited."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.sections import ANCHOR
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.diffusion.rollout import Trajectory
from opd_ds.models import Conditioning
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
                teachers = self._query_teachers(buffers, meter)
                anchors = self._query_anchor(buffers, meter)
        data = {
            task: TrainingData(
                buffers[task], self._known(trajectories[task], teachers[task], anchors.get(task)), batches[task].pairs
            )
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

    def _query_teachers(self, buffers: dict[str, TrajectoryBuffer], meter: RoundMeter) -> dict[str, PerPair]:
        """One pass per teacher over all steps and samples of the round."""
        found = {}
        tasks = self._teachers.in_turn(buffers)
        following = [*tasks[1:], ANCHOR if self._config.anchor else None]
        for task, then in zip(tasks, following, strict=True):
            with self._teachers.active(task) as teacher:
                if then is not None:
                    self._teachers.prefetch(then)
                found[task] = self._query_frozen(teacher, buffers[task], self._teachers.guidance(task), meter)
        return found

    def _query_anchor(self, buffers: dict[str, TrajectoryBuffer], meter: RoundMeter) -> dict[str, PerPair]:
        """The anchor over all tasks; nothing where there is none."""
        if self._config.anchor is None:
            return {}
        guidance = self._teachers.guidance(ANCHOR)
        with self._teachers.active(ANCHOR) as anchor:
            return {task: self._query_frozen(anchor, buffer, guidance, meter) for task, buffer in buffers.items()}

    def _known(self, trajectory: Trajectory, teacher: PerPair, anchor: PerPair | None) -> Columns[TeacherVelocities]:
        """What the loss knows of one task's pairs."""
        velocity, noise = (None if v is None else PerState(v) for v in (trajectory.velocity, trajectory.noise))
        return Columns(self.known_class, named(teacher=teacher, anchor=anchor, velocity=velocity, noise=noise))


def _buffer(trajectory: Trajectory, batch: TaskBatch) -> TrajectoryBuffer:
    assert trajectory.states is not None
    return TrajectoryBuffer(trajectory.states, batch.chosen, batch.part.weights, batch.cond)
