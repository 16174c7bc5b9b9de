"""Who draws what: every sample is named by (seed, round, task, index), never by rank.

So a run on one rank and a run on a hundred draw the same prompts and the same noise, and a resumed run draws what
the uninterrupted one would have drawn, with no generator state to save.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from opd_ds.diffusion.noise import sample_seed

Kind = TypeVar("Kind", bound=Hashable)


def draw_prompts(count: int, samples: int, seed: int, round_index: int, task: str) -> list[int]:
    """Indices into a set of `count` prompts for the `samples` samples of a round.

    Without replacement: rounds walk through one seeded permutation after another.
    """
    places = (divmod(position, count) for position in range(round_index * samples, (round_index + 1) * samples))
    return [int(_permutation(count, seed, epoch, task)[offset]) for epoch, offset in places]


@lru_cache(maxsize=32)
def _permutation(count: int, seed: int, epoch: int, task: str) -> Tensor:
    """int32 [count]; made once for the rounds that walk through it."""
    generator = torch.Generator().manual_seed(sample_seed(seed, epoch, f"{task}/prompts", 0))
    return torch.randperm(count, generator=generator).int()


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


def shard(total: int, rank: int, world: int) -> Shard:
    """Contiguous shares of ceil(total / world) samples."""
    (found,) = shards_by(range(total), [None] * total, world, total).values()
    return found[rank]


def shards_by(
    samples: Sequence[int], kinds: Sequence[Kind], world: int, total: int
) -> dict[tuple[Kind, ...], list[Shard]]:
    """All ranks' contiguous shares of some of `total` samples that cannot all share a forward, in parts of one kind.

    Samples of one kind are neighbours, and where the kind changes on any rank, a part ends on all. So ranks make
    equally many forwards of equally many samples, if not of one kind; no sample is repeated but at the very end.

    Args:
        kinds: of the samples.

    Returns:
        by the kinds that a part has on all ranks, the shards of these.
    """
    share, last = -(-len(samples) // world), len(samples) - 1
    places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
    order = sorted(range(len(samples)), key=lambda number: places[kinds[number]])
    parts: dict[tuple[Kind, ...], list[int]] = {}
    for position in range(share):
        of_ranks = tuple(kinds[order[min(rank * share + position, last)]] for rank in range(world))
        parts.setdefault(of_ranks, []).append(position)

    def of_rank(rank: int, own: list[int]) -> Shard:
        positions = [rank * share + position for position in own]
        weights = torch.tensor([float(position <= last) for position in positions])
        return Shard([samples[order[min(position, last)]] for position in positions], weights, total)

    return {of_ranks: [of_rank(rank, own) for rank in range(world)] for of_ranks, own in parts.items()}
