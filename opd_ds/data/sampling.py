"""Who draws what: every sample is named by (seed, round, task, index), never by rank.

So a run on one rank and a run on a hundred draw the same prompts and the same noise, and a resumed run draws what
the uninterrupted one would have drawn, with no generator state to save.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ds.diffusion.noise import sample_seed


def draw_prompts(count: int, samples: int, seed: int, round_index: int, task: str) -> list[int]:
    """Indices into a set of `count` prompts for the `samples` samples of a round.

    Without replacement: rounds walk through one seeded permutation after another.
    """
    chosen = []
    permutations: dict[int, list[int]] = {}
    for position in range(round_index * samples, (round_index + 1) * samples):
        epoch, offset = divmod(position, count)
        if epoch not in permutations:
            generator = torch.Generator().manual_seed(sample_seed(seed, epoch, f"{task}/prompts", 0))
            permutations[epoch] = torch.randperm(count, generator=generator).tolist()
        chosen.append(permutations[epoch][offset])
    return chosen


@dataclass(frozen=True)
class Shard:
    """One rank's part of `total` samples. All ranks hold equally many: the last ones repeat a sample at weight 0.

    Equal counts keep every rank's sequence of engine calls the same, which ZeRO-3 needs.
    """

    indices: list[int]
    weights: Tensor
    total: int

    def __len__(self) -> int:
        return len(self.indices)


def rows_on_a_rank(total: int, world: int, updates: int = 1) -> int:
    """How many samples a rank holds, with those that it repeats."""
    return updates * -(-(total // updates) // world)


def shard(total: int, rank: int, world: int, updates: int = 1) -> Shard:
    """Contiguous shares of ceil(total / world) samples; of each of the round's `updates` disjoint parts, one after the
    other, where there are several. They have to divide `total`.
    """
    size, share = total // updates, rows_on_a_rank(total, world, updates) // updates
    positions = range(rank * share, (rank + 1) * share)
    indices = [update * size + min(position, size - 1) for update in range(updates) for position in positions]
    return Shard(indices, torch.tensor([float(position < size) for position in positions] * updates), total)
