"""Whether the packages, weights and own files that a run's rewards need are on every node. Asks no network."""

from __future__ import annotations

from opd_ds.config.schema import RunConfig
from opd_ds.doctor.findings import Seen
from opd_ds.rewards.needs import run_needs


def look_at_rewards(config: RunConfig) -> list[Seen]:
    """Every reward of the run's tasks and probes."""
    return [
        Seen(
            f"reward {one.label}",
            f"{'not ready' if one.absent else 'ready'}, for {', '.join(one.asked_by)}",
            "\n".join(one.absent) or None,
            agree=one.sha256,
        )
        for one in run_needs(config)
    ]
