"""What a run has written, for tests that compare runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from opd_ds.runs.monitor import read_metrics


def metrics(folder: Path) -> list[dict[str, float]]:
    """What must be equal: everything but times, rates, memory, and passes, which count padding."""
    rows = read_metrics(folder / "metrics.jsonl")
    measured = ("seconds/", "samples_per_s", "memory/", "passes/")
    return [{key: value for key, value in row.items() if not key.startswith(measured)} for row in rows]


def assert_close(ours: list[dict[str, float]], theirs: list[dict[str, float]], rel: float = 1e-4) -> None:
    """Row by row, where rounding may differ."""
    assert [row["round"] for row in ours] == [row["round"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert value == pytest.approx(other[key], rel=rel), (key, mine, other)


def wait_for_rounds(folder: Path, count: int, timeout: float = 300) -> None:
    """Until the run in `folder` has finished `count` rounds; seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").is_file() and len(read_metrics(folder / "metrics.jsonl")) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} rounds within {timeout} s")
