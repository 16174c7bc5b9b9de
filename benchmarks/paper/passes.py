"""Passes of the network that a finished run took."""

from __future__ import annotations

from pathlib import Path

from opd_ds.plan.passes import Passes
from opd_ds.runs.monitor import METRICS_FILE, read_metrics


def measured_passes(folder: Path) -> Passes:
    """Of all rounds in the run's metrics.jsonl."""
    total = Passes()
    for row in read_metrics(folder / METRICS_FILE):
        negative = sum(
            count for name, count in row.items() if name.startswith("passes/") and name.endswith("_negative")
        )
        total += Passes(row["passes/forward"], row["passes/backward"], negative)
    return total
