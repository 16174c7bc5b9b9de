"""Who draws what: every sample is named by (seed, round, task, index), never by rank.

So a run on one rank and a run on a hundred draw the same prompts and the same noise, and a resumed run draws what
the uninterrupted one would have drawn, with no generator state to save.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def sample_seed(seed: int, round_index: int, task: str, index: int) -> int:
    """A 63-bit seed for one sample. The task enters by name: adding a task changes no other task's draws."""
    digest = hashlib.sha256(f"{seed}/{round_index}/{task}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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


class SampleNoise:
    """Gaussian noise with one generator per sample, so it depends on the sample alone, not on its batch.

    Drawn on the CPU in float32: the same numbers on every device.
    """

    def __init__(self, seeds: list[int], shape: tuple[int, ...]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shape = shape

    @classmethod
    def cat(cls, parts: list[SampleNoise]) -> SampleNoise:
        """The samples of all `parts` in order; they go on drawing from the same generators."""
        joined = cls([], parts[0]._shape)
        joined._generators = [generator for part in parts for generator in part._generators]
        return joined

    def __len__(self) -> int:
        return len(self._generators)

    def __getitem__(self, rows: slice) -> SampleNoise:
        """The samples `rows`; they go on drawing from the same generators."""
        part = SampleNoise([], self._shape)
        part._generators = self._generators[rows]
        return part

    def draw(self, rows: slice) -> Tensor:
        """The next noise of the samples `rows`: [b, *shape]."""
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators[rows]])
