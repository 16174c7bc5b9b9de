"""Exponential moving average of the student, each rank averaging only the master weights it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from opd_ds.config import EmaSection
from opd_ds.engine.state import EMA, ShardReader, entry
from opd_ds.engine.student import StudentEngine


class ShardedEma:
    """EMA over `StudentEngine.fragments`: an update is local and costs no gather, whatever the ZeRO stage."""

    def __init__(self, engine: StudentEngine, settings: EmaSection) -> None:
        self._engine, self._settings = engine, settings
        self._shards = [fragment.master.clone() for fragment in engine.fragments]
        self._steps = 0
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Call after every optimizer step; acts on every `every`-th."""
        self._steps += 1
        if self._steps % self._settings.every:
            return
        self._updates += 1
        decay = self._settings.decay
        if self._settings.warmup:
            decay = min(decay, (1 + self._updates) / (10 + self._updates))
        for shard, fragment in zip(self._shards, self._engine.fragments, strict=True):
            shard.lerp_(fragment.master, 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the student's network holds the averaged weights. Collective; do not train inside."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for shard, fragment in zip(self._shards, self._engine.fragments, strict=True):
            kept = fragment.master.clone()
            fragment.master.copy_(shard)
            shard.copy_(kept)
        self._engine.publish_masters()

    def copy_out(self) -> dict[str, Tensor]:
        """This rank's part of the averages, as entries of `opd_ds.engine.state`."""
        owned = set(self._engine.owned)
        pairs = zip(self._engine.fragments, self._shards, strict=True)
        return {entry(EMA, fragment): shard.to("cpu", copy=True) for fragment, shard in pairs if fragment in owned}

    def numbers(self) -> dict[str, int]:
        return {"steps": self._steps, "updates": self._updates}

    def copy_in(self, shards: ShardReader, numbers: dict[str, int]) -> None:
        """Go on from a checkpoint, whatever ranks and ZeRO stage wrote it."""
        self._steps, self._updates = numbers["steps"], numbers["updates"]
        for fragment, shard in zip(self._engine.fragments, self._shards, strict=True):
            shard.copy_(shards.read(EMA, fragment.name, fragment.start, fragment.numel))
