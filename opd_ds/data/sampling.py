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


def shard(total: int, rank: int, world: int) -> Shard:
    """Contiguous shares of ceil(total / world) samples."""
    share = -(-total // world)
    positions = range(rank * share, (rank + 1) * share)
    weights = torch.tensor([float(position < total) for position in positions])
    return Shard([min(position, total - 1) for position in positions], weights, total)
