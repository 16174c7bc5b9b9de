"""Adding up the round's loss: micro-batch by micro-batch over all tasks, then one reduction of the sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from opd_ds.engine import Group, StudentEngine

# What a loss knows of a micro-batch of pairs beside the student's velocities: a dataclass of the loss's own.
Known_contra = TypeVar("Known_contra", contravariant=True)


class Loss(Protocol[Known_contra]):
    """The loss of an algorithm.

    Attributes:
        measures: names of what it measures beside itself, of some tasks or of all.
    """

    @property
    def measures(self) -> Sequence[str]: ...

    def __call__(self, velocity: Tensor, steps: Tensor, known: Known_contra) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's velocities [b, C, ...] at steps int64 [b] to the loss of each pair float32 [b], and by name
        what is measured of it [b].
        """
        ...


@dataclass(frozen=True)
class RoundLosses:
    """Equal on all ranks; by task and measure.

    Attributes:
        means: over samples and trained steps.
        by_step: float64 [T], NaN on steps that were not trained.
    """

    loss: float
    means: dict[str, dict[str, float]]
    by_step: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class LossTerm:
    """One task's rows of a micro-batch.

    Attributes:
        loss, measured: float32 [b], of these rows, and what else the loss measured of them: the same names for all
            rows of a task.
        steps: int64 [b], on the device of `loss`.
        weights: [b], there as well, 0 for padding and for samples that do not count.
        pairs: (sample, step) pairs of the task in this optimizer step that count, over all ranks.
    """

    task: str
    loss: Tensor
    measured: dict[str, Tensor]
    steps: Tensor
    weights: Tensor
    pairs: float


class RoundAccumulator:
    """Backward of every micro-batch of one optimizer step.

    The loss of a task is the mean over its samples (of all ranks), its trained steps and the latent dimensions; the
    round's loss is the sum over tasks of task weight times loss. So another task, or more samples of one task,
    rescale nothing.

    Args:
        weights: the round's tasks and their weights.
        measures: names of what the losses measure beside themselves.
        steps: of a trajectory.
        micro_batches: of this optimizer step.
    """

    def __init__(
        self,
        student: StudentEngine,
        group: Group,
        weights: dict[str, float],
        measures: Sequence[str],
        steps: int,
        micro_batches: int,
    ) -> None:
        self._student, self._group, self._weights = student, group, weights
        self._rows = ("count", "loss", *measures)
        self._left = micro_batches
        self._sums = {task: torch.zeros(len(self._rows), steps, device=group.device) for task in weights}
        self._measured: dict[str, set[str]] = {task: set() for task in weights}

    def add(self, *shares: LossTerm) -> None:
        """One micro-batch: the rows of one task, or of several that were computed together."""
        self._left -= 1
        parts = [(share.loss * share.weights).sum() * self._factor(share) for share in shares]
        self._student.accumulate(torch.stack(parts).sum(), last=self._left == 0)
        for share in shares:
            weights = share.weights
            absent = dict.fromkeys(self._rows, torch.zeros_like(weights))
            values = absent | {"count": torch.ones_like(weights), "loss": share.loss, **share.measured}
            self._measured[share.task] |= share.measured.keys()
            # Not a product with the weight alone: 0 times what overflowed would be NaN, in what is only measured too.
            rows = [torch.where(weights > 0, values[name].detach() * weights, 0.0) for name in self._rows]
            self._sums[share.task].index_add_(1, share.steps, torch.stack(rows))

    def _factor(self, share: LossTerm) -> float:
        return self._weights[share.task] / share.pairs

    def measure(self) -> RoundLosses:
        """The sums over all ranks; the one host sync of the round. Collective."""
        if self._left != 0:
            raise RuntimeError(f"{self._left} micro-batches of the round were planned but not added")
        totals = self._group.sum_over_samples(torch.stack(list(self._sums.values())))
        round_loss = 0.0
        means: dict[str, dict[str, float]] = {}
        by_step: dict[str, dict[str, Tensor]] = {}
        for task, (count, loss, *measured) in zip(self._sums, totals, strict=True):
            round_loss += self._weights[task] * float(loss.sum() / count.sum())
            rows = zip(self._rows[2:], measured, strict=True)
            named = {name: row for name, row in rows if name in self._measured[task]}
            means[task] = {name: float(row.sum() / count.sum()) for name, row in named.items()}
            by_step[task] = {name: row / count for name, row in named.items()}
        return RoundLosses(round_loss, means, by_step)
