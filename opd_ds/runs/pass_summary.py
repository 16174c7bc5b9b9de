"""What a run's learning cost in passes of the network: by trajectory, by trained state, by reward gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from opd_ds.config.schema import RunConfig
from opd_ds.plan.passes import Passes
from opd_ds.training.meter import PARTS

POINT = 0.01  # of a mean reward


def pass_summary(
    config: RunConfig, rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Mapping[str, float | None]]
) -> dict[str, Any] | None:
    """Of all rounds; None where they are not in the records.

    Args:
        rows: of metrics.jsonl.
        scores: of each task `base` and `student`, as `summary` in `opd_ds.evaluation.tables` gives them.

    Returns:
        `forward` and `backward`, `units` (a backward pass counts as two), `by_part` the forward ones, and units
        `per_trajectory`, `per_trained_state` and `per_point`: by 0.01 of held-out reward that the student gained over
        the base, as a mean of the tasks; None where nothing was gained, or not all is known.
    """
    rows = [row for row in rows if "passes/forward" in row]
    if [row["round"] for row in rows] != [*range(1, config.run.rounds + 1)]:
        return None
    total = sum((Passes(row["passes/forward"], row["passes/backward"]) for row in rows), Passes())
    samples = [config.samples(task) for index in range(len(rows)) for task in config.tasks_of(index)]
    names = [name for part in PARTS for name in (part, f"{part}_negative")]
    trajectories, gained = sum(samples), _gained([scores[task] for task in config.tasks])
    return {
        "forward": total.forward,
        "backward": total.backward,
        "units": total.units,
        "by_part": {name: sum(row.get(f"passes/{name}", 0) for row in rows) for name in names},
        "trajectories": trajectories,
        "per_trajectory": total.units / trajectories,
        "per_trained_state": total.units / (trajectories * config.trained_steps),
        "per_point": total.units / gained * POINT if gained is not None and gained > 0 else None,
    }


def as_lines(found: Mapping[str, Any]) -> list[str]:
    """For people."""
    parts = [
        f"{part} {found['by_part'][part]:,}"
        + (f" ({negative:,} with the negative prompt)" if (negative := found["by_part"][f"{part}_negative"]) else "")
        for part in PARTS
    ]
    each = [f"{found['per_trajectory']:.1f} a trajectory", f"{found['per_trained_state']:.1f} a trained state"]
    if found["per_point"] is not None:
        each.append(f"{found['per_point']:,.0f} for each {POINT} of mean held-out reward over the base")
    return [
        f"passes:       {found['forward']:,} forward ({', '.join(parts)}) and {found['backward']:,} backward",
        f"pass units:   {', '.join(each)} (forward + 2 x backward)",
    ]


def tracked(found: Mapping[str, Any]) -> dict[str, float]:
    """For trackers."""
    named = {f"passes/{name}": found[name] for name in ("per_trajectory", "per_trained_state", "per_point")}
    return {name: value for name, value in named.items() if value is not None}


def _gained(scores: Sequence[Mapping[str, float | None]]) -> float | None:
    gains = []
    for one in scores:
        base, student = one["base"], one["student"]
        if base is None or student is None:
            return None
        gains.append(student - base)
    return fmean(gains)
