"""`python -m benchmarks passes`: what is planned, counted and compared, without its runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.passes import WAYS, Measured, _measured, _run, as_markdown, public_passes
from opd_ds.plan.passes import planned_passes
from opd_ds.utils.json_lines import json_line


def test_the_public_loop_takes_94_passes_a_trajectory_and_the_others_less_than_half() -> None:
    runs = {way.name: _run(0, way, 3) for way in WAYS}
    assert public_passes(runs["public loop"].config) == 94
    for way in WAYS[1:]:
        config = runs[way.name].config
        trajectories = sum(
            config.samples(task) for index in range(config.run.rounds) for task in config.tasks_of(index)
        )
        assert planned_passes(config).units / trajectories < 40, way.name


def test_passes_until_a_reward_are_read_off_the_line() -> None:
    slow = Measured("slow", 94.0, [0.0, 100.0, 200.0], [0.1, 0.3, 0.5])
    fast = Measured("fast", 20.0, [0.0, 20.0, 40.0], [0.1, 0.5, 0.7])
    assert slow.until(0.4) == pytest.approx(150)
    assert slow.until(0.6) is None
    row = as_markdown([slow, fast]).splitlines()[3]
    assert "| 20 | 0.10 |" in row  # up to 0.5, the slow one's best


def test_a_run_is_read_with_the_public_loops_passes(tmp_path: Path) -> None:
    way, run = WAYS[0], _run(0, WAYS[0], 3)
    folder = tmp_path / run.name
    folder.mkdir()
    scores = {"text/miniature_text": 0.4, "composition/miniature_composition": 0.5, "look/miniature_look": 0.6}
    (folder / "metrics.jsonl").write_text(json_line({"round": 1, "passes/forward": 52, "passes/backward": 18}))
    (folder / "scores.jsonl").write_text(json_line({"round": 1, "all_tasks/miniature_all": 0.1, **scores}))
    (folder / "summary.json").write_text(json.dumps({"passes": {"per_trajectory": 88.0}}))
    found = _measured(way, run, tmp_path)
    assert found.per_trajectory == 94
    assert found.units == pytest.approx([94])
    assert found.rewards == pytest.approx([0.5])
