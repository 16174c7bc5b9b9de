"""On-policy distillation (DiffusionOPD, arXiv 2605.15055): the task's teacher is asked at the states visited."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate, chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.data import Kind, Size
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.diffusion.rollout import Keep, MicroBatch, Rows, Trajectory, in_step
from opd_ds.errors import UserError
from opd_ds.models import Conditioning, GuidedVelocity, ModelFamily
from opd_ds.training.asking import Said, VisitedStates
from opd_ds.training.buffer import Columns, PerPair, PerState, TrajectoryBuffer, named
from opd_ds.training.late import WaitingRound
from opd_ds.training.meter import RoundMeter
from opd_ds.training.objectives import ClosedFormLoss, TeacherVelocities
from opd_ds.training.remote_teachers import RemoteTeachers
from opd_ds.training.shares import Share, TaskBatch
from opd_ds.training.teachers import TeacherPool
from opd_ds.training.trainer import BufferedTrainer, Components, Experience, Saved, TrainingData


@dataclass(frozen=True)
class RolloutGroup:
    """Shares that are rolled out together, as they have one student guidance and are of one kind on every rank: a step
    is one forward for all of them.

    Attributes:
        rows: of each share, one after the other.
        parts: the micro-batches of the rollout, with as many forwards on every rank.
    """

    guidance: float
    size: Size
    rows: dict[Share, slice]
    cond: Conditioning
    noise: SampleNoise
    parts: list[MicroBatch]

    @property
    def lengths(self) -> list[int]:
        return [rows.stop - rows.start for rows in self.rows.values()]

    def of(self, share: Share, rows: Rows) -> slice:
        """What of `rows` is the share's, counted from the start of `rows`; it may be empty."""
        own = self.rows[share]
        return slice(bisect_left(rows.host, own.start), bisect_left(rows.host, own.stop))


def rollout_groups(
    config: DistilConfig, index: int, batches: dict[Share, TaskBatch], world: World
) -> list[RolloutGroup]:
    """The shares of round `index` by student guidance and kinds. Where nobody looks at the images, every sample's
    rollout ends at its last trained step.
    """
    together: dict[tuple[float, tuple[Kind, ...]], list[Share]] = {}
    for share in batches:
        together.setdefault((config.student_guidance(share.task), share.kinds), []).append(share)
    groups = []
    for (guidance, _), shares in together.items():
        ends = list(accumulate(len(batches[share].part) for share in shares))
        rows = {share: slice(end - len(batches[share].part), end) for share, end in zip(shares, ends, strict=True)}
        cond = Conditioning.cat([batches[share].cond for share in shares])
        noise = SampleNoise.cat([batches[share].noise for share in shares])
        by_share = [batches[share].last_steps() for share in shares]
        last = [list(chain.from_iterable(own)) for own in zip(*by_share, strict=True)]
        taken = [list(map(config.steps_until_trained, own)) for own in last]
        parts = in_step(taken, config.rollout.micro_batch, world.rank)
        if config.shows_rollouts(index):
            parts = [part.whole(config.rollout.steps) for part in parts]
        groups.append(RolloutGroup(guidance, shares[0].size, rows, cond, noise, parts))
    return groups


class Distillation(BufferedTrainer):
    """Rounds of several teachers into one student, by the closed form."""

    losses: dict[Size, ClosedFormLoss]
    loss_class: type[ClosedFormLoss] = ClosedFormLoss
    known_class: type[TeacherVelocities] = TeacherVelocities
    _teachers: TeacherPool  # unless they have ranks of their own
    keeps_transitions = False

    def __init__(self, parts: Components) -> None:
        super().__init__(parts)
        self._config: DistilConfig = parts.config
        self._remote: RemoteTeachers | None = None
        if isinstance(parts.teachers, RemoteTeachers):
            self._remote = parts.teachers
        else:
            self._teachers = parts.teachers
        self.losses = {
            size: self.loss_class(self._config, sampler.coefficients, sampler.sigmas, parts.group.device)
            for size, sampler in self._samplers.items()
        }
        late = self._config.scoring.late
        self._waiting = WaitingRound(self._draw, self._buffer, self.known_class, parts.group) if late else None

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

    def _collect(self, index: int, batches: dict[Share, TaskBatch], meter: RoundMeter) -> Experience[TeacherVelocities]:
        with ExitStack() as stack:
            with meter.phase("rollout"):
                visited = None
                if self._remote is not None:
                    visited = VisitedStates(self._remote, self._config, self._family, batches, self._uncond, meter)
                else:
                    stack.enter_context(self._teachers.gathered())  # for both
                trajectories = self._roll_out_tasks(index, batches, meter, visited)
            return self._score(index, trajectories, batches, meter, visited)

    def _score(
        self,
        index: int,
        trajectories: dict[Share, Trajectory],
        batches: dict[Share, TaskBatch],
        meter: RoundMeter,
        visited: VisitedStates | None,
    ) -> Experience[TeacherVelocities]:
        """What the frozen networks say at the states that were visited in round `index`; teachers that have ranks of
        their own were asked during the rollout.
        """
        buffers = {share: self._buffer(share, trajectories[share].states, batches[share]) for share in batches}
        with meter.phase("score"):
            if visited is None:
                said = self._query(buffers, meter)
            else:
                buffers = {share: replace(buffer, order=visited.order(share)) for share, buffer in buffers.items()}
                said = {share: visited.said(share) for share in buffers}
        data = {
            share: TrainingData(buffers[share], self._known(share.task, trajectories[share], said[share]), batch.pairs)
            for share, batch in batches.items()
        }
        shown = trajectories if self._config.shows_rollouts(index) else {}
        return Experience(batches, data, {share: trajectory.final for share, trajectory in shown.items()})

    def _roll_out_tasks(
        self, index: int, batches: dict[Share, TaskBatch], meter: RoundMeter, visited: VisitedStates | None
    ) -> dict[Share, Trajectory]:
        """The student's own trajectories in round `index`; `visited` hears of their states."""
        found: dict[Share, Trajectory] = {}
        with self._student.gathered() as student:
            for group in rollout_groups(self._config, index, batches, self._group.drawing):
                chosen, sampler = torch.cat([batches[share].chosen for share in group.rows]), self._samplers[group.size]
                told = None if visited is None else visited.told(group.rows, sampler)
                keep = Keep(chosen, self._family.dtype, self.keeps_transitions, told)
                rolled = self._roll_out(
                    student, group.cond, group.noise, sampler, group.guidance, meter, parts=group.parts, keep=keep
                )
                found |= zip(group.rows, rolled.split(group.lengths), strict=True)
        return {share: found[share] for share in batches}

    @classmethod
    def check(cls, config: DistilConfig, family: ModelFamily) -> None:
        super().check(config, family)
        check_branches(config, family)
        if config.rollout.negative_every > 1 and family.boundary is not None:
            raise UserError(
                f"rollout.negative_every = {config.rollout.negative_every}: model.family = {config.model.family!r} has "
                "two networks, and the direction of one would guide the other; set it to 1"
            )

    def _losses(
        self, size: Size, predicted: GuidedVelocity, steps: Tensor, known: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.losses[size](predicted.velocity, steps, known, predicted.branches)

    def _query(self, buffers: dict[Share, TrajectoryBuffer], meter: RoundMeter) -> dict[Share, dict[str, Said]]:
        """What each of its task's frozen networks says of all a share's pairs (see `DistilConfig.asked`). One network
        after the other, so that one which travels does so once.
        """
        asking: dict[str, list[Share]] = {}
        for share in buffers:
            for name in self._config.asked(share.task):
                asking.setdefault(name, []).append(share)
        names = self._teachers.in_turn(asking)
        found: dict[Share, dict[str, Said]] = {share: {} for share in buffers}
        for name, then in zip_longest(names, names[1:]):
            with self._teachers.active(name) as network:
                if then is not None:
                    self._teachers.prefetch(then)
                for share in asking[name]:
                    guidance = self._config.asked(share.task)[name]
                    if name in self._config.kept_apart(share.task, self._family.passes):
                        found[share][name] = self._query_branches(network, buffers[share], guidance, meter)
                    else:
                        found[share][name] = Said(self._query_frozen(network, buffers[share], guidance, meter))
        return found

    def _query_branches(self, network: Any, buffer: TrajectoryBuffer, guidance: float, meter: RoundMeter) -> Said:
        """`_query_frozen` with what guidance made the velocities of."""

        def say(x: Tensor, sigma: Tensor, cond: Conditioning, stage: int) -> Tensor:
            predicted = self._predict(network, x, sigma, cond, guidance, meter.part("score"), stage)
            assert predicted.branches is not None
            return torch.cat([predicted.velocity[:, None], predicted.branches], 1)

        values = self._ask(buffer, say)
        return Said(PerPair(values[:, 0]), PerPair(values[:, 1:]))

    def _known(self, task: str, trajectory: Trajectory, said: Mapping[str, Said]) -> Columns[TeacherVelocities]:
        """What the loss knows of the pairs of a share of `task`."""
        velocity, noise = (None if v is None else PerState(v) for v in (trajectory.velocity, trajectory.noise))
        roles = self._config.roles(task)
        guided = {role: said[name].guided for role, name in roles.items()}
        branches = {f"{role}_branches": said[name].branches for role, name in roles.items()}
        return Columns(self.known_class, named(velocity=velocity, noise=noise, **guided, **branches))


def check_branches(config: DistilConfig, family: ModelFamily) -> None:
    """Raise UserError where branches of guidance are to be compared in a family that has none."""
    if config.objective.guided == "apart" and family.embedded_guidance:
        raise UserError(
            f"objective.guided = 'apart': model.family = {config.model.family!r} takes the guidance as an input of its "
            "network, in one pass, so there are no two branches; set it to 'together'"
        )
