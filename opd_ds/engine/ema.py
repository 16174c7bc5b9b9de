"""Exponential moving average of the student, each rank averaging only the master weights it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from opd_ds.config import EmaSection
from opd_ds.engine.student import StudentEngine


def ema_file(rank: int | str) -> str:
    """The name of a rank's part in a checkpoint folder."""
    return f"ema-rank{rank}.pt"


class ShardedEma:
    """EMA over `StudentEngine.masters()`: an update is local and costs no gather, whatever the ZeRO stage."""

    def __init__(self, engine: StudentEngine, settings: EmaSection) -> None:
        self._engine, self._settings = engine, settings
        self._shards = [master.detach().clone() for master in engine.masters()]
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
        for shard, master in zip(self._shards, self._engine.masters(), strict=True):
            shard.lerp_(master.detach().to(shard.device), 1 - decay)

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
        for shard, master in zip(self._shards, self._engine.masters(), strict=True):
            kept = master.detach().clone()
            master.data.copy_(shard)
            shard.copy_(kept)
        self._engine.publish_masters()

    def save(self, file: Path) -> None:
        """This rank's part."""
        torch.save({"steps": self._steps, "updates": self._updates, "shards": self._shards}, file)

    def load(self, file: Path) -> None:
        """This rank's part, written by the same rank of a run of the same size."""
        state = torch.load(file, weights_only=True, map_location="cpu")
        self._steps, self._updates = state["steps"], state["updates"]
        for shard, saved in zip(self._shards, state["shards"], strict=True):
            shard.copy_(saved)
