"""Who draws what: every sample is named by (seed, round, task, index), never by rank.

So a run on one rank and a run on a hundred draw the same prompts and the same noise, and a resumed run draws what
the uninterrupted one would have drawn, with no generator state to save.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from opd_ds.diffusion.noise import sample_seed

Kind = TypeVar("Kind", bound=Hashable)


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

    @classmethod
    def cat(cls, parts: Sequence[Shard]) -> Shard:
        """Parts of the same samples in order, one or more."""
        indices = [index for part in parts for index in part.indices]
        return cls(indices, torch.cat([part.weights for part in parts]), parts[0].total)


def rows_on_a_rank(total: int, world: int, updates: int = 1, kinds: int = 1) -> int:
    """How many samples a rank holds, with those that it repeats; of so many `kinds` of samples that cannot share a
    forward (`by_kind`) the most that there can be.
    """
    own = total // updates
    return updates * ((own + min(kinds, own) * (world - 1)) // world)


def shard(total: int, rank: int, world: int) -> Shard:
    """Contiguous shares of ceil(total / world) samples."""
    return share_of(range(total), rank, world, total)


def share_of(samples: Sequence[int], rank: int, world: int, total: int) -> Shard:
    """The same of some of the `total` samples."""
    share, last = -(-len(samples) // world), len(samples) - 1
    positions = range(rank * share, (rank + 1) * share)
    weights = torch.tensor([float(position <= last) for position in positions])
    return Shard([samples[min(position, last)] for position in positions], weights, total)


def by_kind(kinds: Sequence[Kind]) -> dict[Kind, list[int]]:
    """The samples of each kind, kinds in the order in which the samples have them. Where each kind is shared out by
    itself (`share_of`), all ranks' forwards are of the same kinds in the same order.

    Args:
        kinds: of all samples, in order.
    """
    members: dict[Kind, list[int]] = {}
    for index, kind in enumerate(kinds):
        members.setdefault(kind, []).append(index)
    return members
