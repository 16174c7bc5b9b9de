"""Noise that is named: every sample draws from a generator of its own, seeded by what the sample is, never by rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def sample_seed(seed: int, round_index: int, task: str, index: int) -> int:
    """A 63-bit seed for one sample. The task enters by name: adding a task changes no other task's draws."""
    digest = hashlib.sha256(f"{seed}/{round_index}/{task}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class SampleNoise:
    """Gaussian noise with one generator per sample, so it depends on the sample alone, not on its batch.

    Drawn on the CPU in float32: the same numbers on every device.
    """

    def __init__(self, seeds: list[int], shape: tuple[int, ...]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape = shape

    @classmethod
    def cat(cls, parts: list[SampleNoise]) -> SampleNoise:
        """The samples of all `parts` in order; they go on drawing from the same generators."""
        joined = cls([], parts[0].shape)
        joined._generators = [generator for part in parts for generator in part._generators]
        return joined

    def __len__(self) -> int:
        return len(self._generators)

    def __getitem__(self, rows: slice) -> SampleNoise:
        """The samples `rows`; they go on drawing from the same generators."""
        part = SampleNoise([], self.shape)
        part._generators = self._generators[rows]
        return part

    def draw(self, rows: slice | Sequence[int]) -> Tensor:
        """The next noise of the samples `rows`: [b, *shape]."""
        drawing = self._generators[rows] if isinstance(rows, slice) else [self._generators[row] for row in rows]
        return torch.stack([torch.randn(self.shape, generator=one, dtype=torch.float32) for one in drawing])
