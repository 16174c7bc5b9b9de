"""Second sets of the student's weights, each rank holding its part: averages, an earlier policy, the start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opd_ds.config.sections import EmaSection
from opd_ds.engine.shards import ShardReader
from opd_ds.engine.state import EMA, entry
from opd_ds.engine.student import StudentEngine
from opd_ds.errors import Interrupted


class WeightSnapshot:
    """A copy of `StudentEngine.fragments` as they are now. No gather, whatever the ZeRO stage.

    Args:
        kind: its name in checkpoints.
    """

    def __init__(self, engine: StudentEngine, kind: str) -> None:
        self._engine, self.kind = engine, kind
        self._shards = [fragment.master.clone() for fragment in engine.fragments]

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """copy = decay * copy + (1 - decay) * student."""
        for shard, fragment in zip(self._shards, self._engine.fragments, strict=True):
            shard.lerp_(fragment.master, 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the student's network holds these weights. Collective; do not train inside.

        An error of one rank leaves them there: exchanging back is a collective that the other ranks would not join.
        """
        self._exchange()
        try:
            yield
        except Interrupted:  # of all ranks together; the state is saved or about to be
            self._exchange()
            raise
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for shard, fragment in zip(self._shards, self._engine.fragments, strict=True):
            kept = fragment.master.clone()
            fragment.master.copy_(shard)
            shard.copy_(kept)
        self._engine.publish_masters()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part, as entries of `opd_ds.engine.state`."""
        owned = set(self._engine.owned)
        pairs = zip(self._engine.fragments, self._shards, strict=True)
        return {
            entry(self.kind, fragment): shard.to("cpu", copy=True) for fragment, shard in pairs if fragment in owned
        }

    def scalar_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights, fit for JSON."""
        return {}

    def load_state_dict(self, shards: ShardReader, scalars: dict[str, Any]) -> None:
        """Go on from a checkpoint, whatever ranks and ZeRO stage wrote it."""
        for fragment, shard in zip(self._engine.fragments, self._shards, strict=True):
            shard.copy_(shards.read(self.kind, fragment.name, fragment.start, fragment.numel))


class ShardedEma(WeightSnapshot):
    """Exponential moving average of the student."""

    def __init__(self, engine: StudentEngine, settings: EmaSection) -> None:
        super().__init__(engine, EMA)
        self._settings = settings
        self._steps = 0

    def update(self) -> None:
        """Call after every optimizer step; acts on every `every`-th."""
        self._steps += 1
        if self._steps % self._settings.every:
            return
        decay = self._settings.decay
        if self._settings.warmup:
            decay = min(decay, (1 + self._steps) / (10 + self._steps))
        self.follow(decay)

    @property
    def updated(self) -> bool:
        """Otherwise it is what the student started from."""
        return self._steps >= self._settings.every

    def scalar_state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state_dict(self, shards: ShardReader, scalars: dict[str, Any]) -> None:
        self._steps = scalars["steps"]
        super().load_state_dict(shards, scalars)
