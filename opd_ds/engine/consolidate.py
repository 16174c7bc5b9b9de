"""Whole weights out of a sharded checkpoint, in one process and without an engine."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from opd_ds.engine.shards import ShardReader
from opd_ds.engine.state import EMA, MASTER


def consolidated_weights(checkpoint: Path, shapes: dict[str, list[int]], *, averaged: bool = True) -> dict[str, Tensor]:
    """The trained weights by name, whole, fp32 on the CPU.

    Args:
        checkpoint: a folder `round-NNNNNN`.
        shapes: of the trained parameters, as its `state.json` says.
        averaged: the averages, where the run kept an EMA; otherwise the masters.
    """
    shards = ShardReader(checkpoint)
    kind = EMA if averaged and EMA in shards.kinds else MASTER
    return {name: shards.read(kind, name, 0, math.prod(shape)).reshape(shape) for name, shape in shapes.items()}
