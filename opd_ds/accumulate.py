"""Adding up the round's loss: micro-batch by micro-batch over all tasks, then one look at the sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ds.config import RunConfig
from opd_ds.diffusion import Coefficients, kl_weight, step_weights, velocity_error
from opd_ds.engine import Group, StudentEngine


@dataclass(frozen=True)
class RoundLosses:
    """Equal on all ranks. `step_kl[task]` is float64 [T], NaN on steps that were not trained."""

    loss: float
    task_kl: dict[str, float]
    step_kl: dict[str, Tensor]


class StepObjective:
    """The run's weights per step, [T]: `weights` for the loss, `kl` for what is reported as KL whatever the loss is."""

    def __init__(self, config: RunConfig, coefficients: Coefficients, sigmas: Tensor, device: torch.device) -> None:
        chosen = config.objective
        self.weights = step_weights(coefficients, sigmas, chosen.target, chosen.weighting)
        self.kl = kl_weight(coefficients)
        self.on_device = self.weights.to(device, torch.float32)
        self.task_weights = {name: task.weight for name, task in config.tasks.items()}


class RoundAccumulator:
    """Backward of every micro-batch of one optimizer step.

    The loss of a task is the mean over its samples (of all ranks), its trained steps and the latent dimensions; the
    round's loss is the sum over tasks of task weight times loss. So another task, or more samples of one task,
    rescale nothing.
    """

    def __init__(self, student: StudentEngine, objective: StepObjective, group: Group, micro_batches: int) -> None:
        self._student, self._objective, self._group = student, objective, group
        self._left = micro_batches
        shape = (2, len(objective.weights))  # summed squared velocity error and sample count, per step
        self._sums = {task: torch.zeros(shape, device=group.device) for task in objective.task_weights}

    def add(self, task: str, student: Tensor, teacher: Tensor, steps: Tensor, weights: Tensor, pairs: int) -> None:
        """One micro-batch of velocities [b, C, h, w] at `steps` int64 [b]; `weights` [b] is 0 for filling samples.

        Args:
            pairs: (sample, step) pairs of the task in this optimizer step, over all ranks.
        """
        steps, weights = steps.to(student.device), weights.to(student.device)
        error = velocity_error(student, teacher) * weights
        loss = (self._objective.on_device[steps] * error).sum() * (self._objective.task_weights[task] / pairs)
        self._left -= 1
        self._student.accumulate(loss, last=self._left == 0)
        self._sums[task].index_add_(1, steps, torch.stack([error.detach(), weights]))

    def measure(self) -> RoundLosses:
        """The sums over all ranks; the one host sync of the round. Collective."""
        if self._left != 0:
            raise RuntimeError(f"{self._left} micro-batches of the round were planned but not added")
        totals = self._group.sum(torch.stack(list(self._sums.values())))
        loss, task_kl, step_kl = 0.0, {}, {}
        for task, (error, count) in zip(self._sums, totals, strict=True):
            pairs = count.sum()
            loss += self._objective.task_weights[task] * float((self._objective.weights * error).sum() / pairs)
            task_kl[task] = float((self._objective.kl * error).sum() / pairs)
            step_kl[task] = self._objective.kl * error / count
        return RoundLosses(loss, task_kl, step_kl)
