"""Two networks for two ranges of sigma: the pairs of a round network by network, in the same order on every rank.

Under ZeRO-3 a forward is collective, so all ranks ask the same network at the same time. Where trained steps are drawn
for each sample, ranks differ in how many of them fall to a network: one that has fewer repeats a pair at weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StagePairs:
    """Pairs that one network is asked at, on the host.

    Attributes:
        stage: which network, see `ModelFamily.stages`.
        index, step: int64 [P], the pairs' places among all of the buffer, and their steps.
        counts: bool [P], False where a pair only pads.
    """

    stage: int
    index: Tensor
    step: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.index)


def stage_counts(trained: Sequence[Tensor], stages: Sequence[int]) -> tuple[int, ...]:
    """How many pairs each network has on the rank that has most of them; `trained`: by rank, its trained steps."""
    found = [torch.bincount(torch.tensor(stages)[steps].flatten(), minlength=max(stages) + 1) for steps in trained]
    return tuple(torch.stack(found).amax(0).tolist())


def in_stages(steps: Tensor, stages: Sequence[int], counts: Sequence[int]) -> list[StagePairs]:
    """A buffer's pairs at `steps` int64 [P], network by network.

    Args:
        stages: which network is asked at each step.
        counts: pairs of each network; where there are fewer, the part is filled up. The state of a filler may be one
            that the other network is asked at.
    """
    stage, parts = torch.tensor(stages)[steps], []
    for number, count in enumerate(counts):
        rows = (stage == number).nonzero().flatten()
        padding = count - len(rows)
        index = torch.cat([rows, rows.new_zeros(padding)])
        step = torch.cat([steps[rows], rows.new_full((padding,), stages.index(number))])
        parts.append(StagePairs(number, index, step, torch.arange(count) < len(rows)))
    return parts
