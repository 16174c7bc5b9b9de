"""What is evaluated in tests, and what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd_ds.evaluation.results import Results
from tests.tiny import run_settings


def settings(world: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Two tasks with held-out prompts and two rewards, the second task's first."""
    data = run_settings(world, folder, **changes)
    for task, rewards in (("one", ["miniature_look"]), ("two", ["miniature_composition", "miniature_look"])):
        data["tasks"][task] |= {"eval_prompts": str(world / "prompts.txt"), "rewards": rewards}
    return data


def means(results: Results) -> dict[str, float]:
    return {
        f"{model}/{name}/{label}": entry["mean"]
        for model, by_set in results["scores"].items()
        for name, labels in by_set.items()
        for label, entry in labels.items()
    }
