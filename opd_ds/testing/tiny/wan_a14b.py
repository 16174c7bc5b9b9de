"""A tiny random Wan with two networks."""

from __future__ import annotations

from pathlib import Path

from opd_ds.testing.tiny.parts import save
from opd_ds.testing.tiny.wan import draw, make

__all__ = ["draw", "write"]


def write(folder: Path, seed: int = 0) -> Path:
    """The pipeline folder; of four steps each network has two."""
    return save(make(seed, boundary=0.8), folder)
