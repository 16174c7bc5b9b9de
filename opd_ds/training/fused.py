"""Distillation in one sweep: the rollout's forward is the training forward, and nothing is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ds.config.algorithms import DistilConfig
from opd_ds.diffusion.rollout import Predictor, Rows, rollout
from opd_ds.models import Conditioning, ModelFamily
from opd_ds.training.accumulator import LossTerm, RoundAccumulator
from opd_ds.training.distillation import RolloutGroup, check_branches, rollout_groups
from opd_ds.training.meter import RoundMeter
from opd_ds.training.objectives import ClosedFormLoss, TeacherVelocities
from opd_ds.training.trainer import Components, Learned, TaskBatch, Trainer
from opd_ds.utils.transfer import to_device


class FusedDistillation(Trainer):
    """Per step one student and one teacher pass. Teachers are resident; a round makes one step."""

    loss: ClosedFormLoss

    def __init__(self, parts: Components) -> None:
        super().__init__(parts)
        self._config: DistilConfig = parts.config
        self._teachers = parts.teachers
        self.loss = ClosedFormLoss(self._config, self._coefficients, self._sigmas, parts.group.device)

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
        groups = rollout_groups(self._config, index, batches, self._group.world)
        parts = sum(step < part.length for group in groups for part in group.parts for step in trained)
        final: dict[str, Tensor] = {}
        with meter.phase("train"):
            accumulator = self._accumulator(list(batches), parts)
            for group in groups:
                predict = self._training_step(group, batches, set(trained), accumulator, meter)
                rolled = rollout(
                    predict, group.noise, self._coefficients, self._sigmas, group.parts, device=self._group.device
                )
                final |= {task: own.final for task, own in zip(group.rows, rolled.split(group.sizes), strict=True)}
            losses = accumulator.measure()
        shown = final if self._config.shows_rollouts(index) else {}
        return Learned(batches, losses, self._step(losses, meter), shown)

    def _training_step(
        self,
        group: RolloutGroup,
        batches: dict[str, TaskBatch],
        trained: set[int],
        accumulator: RoundAccumulator,
        meter: RoundMeter,
    ) -> Predictor:
        """The student's velocity at a step of the rollout, after its loss there has been passed back."""
        steps = self._config.rollout.steps
        chosen = {
            task: torch.zeros(len(batches[task].part), steps).scatter_(1, batches[task].chosen, 1.0)
            for task in group.rows
        }
        of_tasks = [chosen[task] * batches[task].part.weights[:, None] for task in group.rows]
        weights = to_device(torch.cat(of_tasks), self._group.device)

        def predict(x: Tensor, sigma: Tensor, rows: Rows, step: int) -> Tensor:
            state, cond = x.to(self._family.dtype), group.cond.select(rows.device, rows.host)
            stage = self._stages[step]
            if step not in trained:
                with torch.no_grad():
                    return self._velocity(self._student, state, sigma, cond, group.guidance, meter, stage)
            parts = {task: own for task in group.rows if (own := group.of(task, rows)).start < own.stop}
            # Before the student's forward, whose activations wait for its backward: a teacher in the student's network
            # would come between the two.
            known = {
                task: self._query(task, state[own], sigma[own], cond[own], meter, stage) for task, own in parts.items()
            }
            with torch.enable_grad():
                predicted = self._predict(self._student, state, sigma, cond, group.guidance, meter, stage)
            velocity, branches = predicted.velocity, predicted.branches
            at = torch.full((len(x),), step, device=x.device)
            terms = []
            for task, own in parts.items():
                apart = None if branches is None else branches[own]
                losses, measured = self.loss(velocity[own], at[own], known[task], apart)
                weight = weights[rows.device, step][own]
                terms.append(LossTerm(task, losses, measured, at[own], weight, batches[task].pairs))
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
                said[name] = self._predict(network, state, sigma, cond, guidance, meter, stage)
        roles = self._config.roles(task)
        guided = {role: said[name].velocity for role, name in roles.items()}
        both = {f"{role}_branches": said[name].branches for role, name in roles.items()}
        branches = {name: values for name, values in both.items() if values is not None}
        return TeacherVelocities(**guided, **branches)
