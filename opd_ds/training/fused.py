"""Distillation in one sweep: the rollout's forward is the training forward, and nothing is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ds.config.algorithms import DistilConfig
from opd_ds.data import Size
from opd_ds.diffusion.rollout import Predictor, Rows, rollout
from opd_ds.models import Conditioning, ModelFamily
from opd_ds.training.accumulator import LossTerm, RoundAccumulator
from opd_ds.training.distillation import RolloutGroup, check_branches, rollout_groups
from opd_ds.training.meter import RoundMeter
from opd_ds.training.objectives import ClosedFormLoss, TeacherVelocities
from opd_ds.training.remote_teachers import RemoteTeachers
from opd_ds.training.shares import Share, TaskBatch
from opd_ds.training.trainer import Components, Learned, Trainer
from opd_ds.utils.transfer import to_device


class FusedDistillation(Trainer):
    """Per step one student and one teacher pass. Teachers are resident; a round makes one step."""

    losses: dict[Size, ClosedFormLoss]

    def __init__(self, parts: Components) -> None:
        super().__init__(parts)
        self._config: DistilConfig = parts.config
        assert not isinstance(parts.teachers, RemoteTeachers)  # the config is refused otherwise
        self._teachers = parts.teachers
        self.losses = {
            size: ClosedFormLoss(self._config, sampler.coefficients, sampler.sigmas, parts.group.device)
            for size, sampler in self._samplers.items()
        }

    @classmethod
    def check(cls, config: DistilConfig, family: ModelFamily) -> None:
        super().check(config, family)
        check_branches(config, family)

    def _learn(self, index: int, meter: RoundMeter) -> Learned:
        with meter.phase("encode"):
            batches = self._draw(index)
        settings = self._config.rollout
        # With random queries any step may be some sample's; the others then weigh 0, so that ranks stay in step.
        first = next(iter(batches.values()))
        trained = range(settings.steps) if settings.trained_steps.queries else first.trained[0].tolist()
        groups = rollout_groups(self._config, index, batches, self._group.drawing)
        parts = sum(step < part.length for group in groups for part in group.parts for step in trained)
        final: dict[Share, Tensor] = {}
        with meter.phase("train"):
            accumulator = self._accumulator(batches, parts)
            for group in groups:
                predict = self._training_step(group, batches, set(trained), accumulator, meter)
                table, sigmas = self._samplers[group.size].coefficients, self._samplers[group.size].sigmas
                rolled = rollout(predict, group.noise, table, sigmas, group.parts, device=self._group.device)
                final |= {share: own.final for share, own in zip(group.rows, rolled.split(group.lengths), strict=True)}
            losses = accumulator.measure()
        shown = final if self._config.shows_rollouts(index) else {}
        return Learned(batches, losses, self._step(losses, meter), shown)

    def _training_step(
        self,
        group: RolloutGroup,
        batches: dict[Share, TaskBatch],
        trained: set[int],
        accumulator: RoundAccumulator,
        meter: RoundMeter,
    ) -> Predictor:
        """The student's velocity at a step of the rollout, after its loss there has been passed back."""
        steps = self._config.rollout.steps
        own_batches = [batches[share] for share in group.rows]
        chosen = [torch.zeros(len(one.part), steps).scatter_(1, one.chosen, 1.0) for one in own_batches]
        weighted = [one * batch.part.weights[:, None] for one, batch in zip(chosen, own_batches, strict=True)]
        weights = to_device(torch.cat(weighted), self._group.device)

        def predict(x: Tensor, sigma: Tensor, rows: Rows, step: int) -> Tensor:
            state, cond = x.to(self._family.dtype), group.cond.select(rows.device, rows.host)
            stage = self._samplers[group.size].stages[step]
            if step not in trained:
                with torch.no_grad():
                    counter = meter.part("rollout")
                    return self._predict(self._student, state, sigma, cond, group.guidance, counter, stage).velocity
            parts = {share: own for share in group.rows if (own := group.of(share, rows)).start < own.stop}
            # Before the student's forward, whose activations wait for its backward: a teacher in the student's network
            # would come between the two.
            known = {
                share: self._query(share.task, state[own], sigma[own], cond[own], meter, stage)
                for share, own in parts.items()
            }
            with torch.enable_grad():
                counter = meter.part("train")
                predicted = self._predict(self._student, state, sigma, cond, group.guidance, counter, stage)
            velocity, branches = predicted.velocity, predicted.branches
            at = torch.full((len(x),), step, device=x.device)
            terms = []
            for share, own in parts.items():
                apart = None if branches is None else branches[own]
                losses, measured = self.losses[group.size](velocity[own], at[own], known[share], apart)
                weight = weights[rows.device, step][own]
                terms.append(LossTerm(share.task, losses, measured, at[own], weight, batches[share].pairs))
            accumulator.add(*terms)
            return velocity.detach()

        return predict

    @torch.no_grad()
    def _query(
        self, task: str, state: Tensor, sigma: Tensor, cond: Conditioning, meter: RoundMeter, stage: int
    ) -> TeacherVelocities:
        """What the frozen networks of a task say of some of its rows."""
        said = {}
        for name, guidance in self._config.asked(task).items():
            with self._teachers.active(name) as network:
                said[name] = self._predict(network, state, sigma, cond, guidance, meter.part("score"), stage)
        roles = self._config.roles(task)
        guided = {role: said[name].velocity for role, name in roles.items()}
        both = {f"{role}_branches": said[name].branches for role, name in roles.items()}
        branches = {name: values for name, values in both.items() if values is not None}
        return TeacherVelocities(**guided, **branches)
