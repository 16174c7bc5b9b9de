"""`python -m benchmarks growth`: its counts grow as they must, and its files appear."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks.growth import as_markdown, open_and_read, read_and_draw, write_cache, write_prompts


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_set_of_prompts_is_written_and_read(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"prompts.{ending}"
    write_prompts(file, 100)
    assert read_and_draw(file).keys() == {"seconds", "of a round", "kept"}


def test_a_text_cache_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "PER_SHARD", 30)
    write_cache(tmp_path, 100)
    assert len(list(tmp_path.glob("shard-*"))) == 4
    assert open_and_read(tmp_path, 100)["lacking"] == 0
    assert open_and_read(tmp_path, 101)["lacking"] == 1


def test_passes_and_memory_grow_with_tasks_and_resolution_as_they_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "TASKS", (1, 2, 4))
    monkeypatch.setattr(growth, "SIDES", (8, 16))
    tasks, resolution = list(growth._tasks()), list(growth._resolution())
    units, memory = ([row[key] for row in tasks] for key in ("pass units a round", "memory, MiB"))
    assert [one / units[0] for one in units] == [1, 2, 4]
    assert memory[2] - memory[1] == pytest.approx(2 * (memory[1] - memory[0]), rel=0.02)
    flops = [row["forward, MFLOP"] for row in resolution]
    assert 1 < flops[1] / flops[0] < 16
    growth._draw({"tasks": tasks, "resolution": resolution}, tmp_path)
    assert (tmp_path / "growth.png").stat().st_size > 0
    assert as_markdown({"tasks": tasks}).count("\n") == 5
