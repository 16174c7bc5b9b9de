"""What a rollout leaves for training: visited states, the steps chosen for training, the teacher's velocities there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd_ds.config import TrainedSteps
from opd_ds.models import Conditioning
from opd_ds.prompts import sample_seed
from opd_ds.rollout import chunks


@dataclass(frozen=True)
class Pairs:
    """A micro-batch of (state, step) pairs: rows `sample` and `step`, both int64 [b], of one task's buffer."""

    sample: Tensor
    step: Tensor


@dataclass
class TrajectoryBuffer:
    """One task's trajectories on this rank.

    Attributes:
        states: [B, T, C, h, w], the dtype the network sees.
        chosen: [B, K] int64, the trained steps of each trajectory.
        weights: [B] float32, 1 for a sample, 0 for one that only fills up the rank's share.
        cond: the B encoded prompts.
        teacher_velocity: per micro-batch of scoring, in the teacher's dtype; filled by the teacher pool.
    """

    states: Tensor
    chosen: Tensor
    weights: Tensor
    cond: Conditioning
    teacher_velocity: list[Tensor] = field(default_factory=list)

    def micro_batches(self, size: int) -> list[Pairs]:
        """All pairs, sample by sample, in micro-batches of `size`; the same order for scoring and for training."""
        count, picks = self.chosen.shape
        sample = torch.arange(count).repeat_interleave(picks)
        step = self.chosen.flatten()
        return [Pairs(sample[rows], step[rows]) for rows in chunks(len(sample), size)]

    def inputs(self, pairs: Pairs, sigmas: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        """States [b, C, h, w], their sigma [b] float32 and their prompts."""
        device = self.states.device
        sample, step = pairs.sample.to(device), pairs.step.to(device)
        return self.states[sample, step], sigmas.to(device, torch.float32)[step], self.cond[sample]

    def scored(self, size: int) -> Iterator[tuple[Pairs, Tensor]]:
        """Training micro-batches of `size` with the teacher's velocities [b, C, h, w] beside them."""
        velocity = torch.cat(self.teacher_velocity)
        start = 0
        for pairs in self.micro_batches(size):
            yield pairs, velocity[start : start + len(pairs.sample)]
            start += len(pairs.sample)


def choose_steps(
    setting: TrainedSteps, steps: int, seed: int, round_index: int, task: str, indices: list[int]
) -> Tensor:
    """The trained steps of the samples `indices`: int64 [B, K]; random queries are named by the sample."""
    if setting.queries is not None:
        drawn = []
        for index in indices:
            generator = torch.Generator().manual_seed(sample_seed(seed, round_index, f"{task}/queries", index))
            drawn.append(torch.randperm(steps, generator=generator)[: setting.queries].sort().values)
        return torch.stack(drawn)
    if setting.steps is not None:
        fixed = torch.tensor(sorted(setting.steps))
    else:
        assert setting.fraction is not None
        fixed = torch.arange(int(steps * setting.fraction))
    return fixed.expand(len(indices), -1)
