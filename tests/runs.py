"""What a run has written, for tests that compare runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from torch import Tensor

from opd_ds.config.schema import RunConfig
from opd_ds.engine import Group
from opd_ds.runs.monitor import read_metrics
from opd_ds.runs.setup import prepare


def metrics(folder: Path) -> list[dict[str, float]]:
    """What must be equal: everything but times, rates, memory, and passes, which count padding."""
    rows = read_metrics(folder / "metrics.jsonl")
    measured = ("seconds/", "samples_per_s", "memory/", "passes/")
    return [{key: value for key, value in row.items() if not key.startswith(measured)} for row in rows]


def write_sgd(folder: Path, stage: int) -> str:
    """A ds_config of plain SGD at a ZeRO stage."""
    file = folder / f"sgd{stage}.json"
    zero = {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    optimizer = {"type": "SGD", "params": {"lr": "auto"}}
    settings = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "optimizer": optimizer}
    file.write_text(json.dumps(settings))
    return str(file)


def gradients_of(config: RunConfig, group: Group) -> dict[str, Tensor]:
    """What one round of a config with SGD and a rate of 1 takes away from the weights."""
    parts = prepare(config, group)
    before = parts.student.gather_weights(trainable_only=True)
    parts.trainer.run_round(0)
    after = parts.student.gather_weights(trainable_only=True)
    return {name: before[name] - after[name] for name in before}


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
