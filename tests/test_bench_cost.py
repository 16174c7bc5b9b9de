"""The sheet of GPU hours and money: prices, the correction, and what is not measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import cost
from benchmarks.cost import Measured, Prices, Run
from opd_ds.config.algorithms import DistilConfig
from opd_ds.errors import UserError
from opd_ds.plan.devices import parse_devices
from opd_ds.plan.planner import Setting, make_plan
from tests.tiny import costs_of


def test_the_runs_are_the_papers() -> None:
    """Three teachers, 24 trajectories a task, 500 rounds."""
    for run in cost.RUNS:
        config = run.config(*(run.measured.changes if run.measured else ()))
        assert (len(config.teachers), config.student.kind, config.run.rounds) == (3, "lora", 500)
        assert {config.samples(task) for task in config.tasks} == {3 if run.measured else 24}


def test_the_sheet_has_assumed_and_given_prices_and_a_measured_correction(
    configured: Callable[..., DistilConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tiny(Run):
        def config(self, *changes: str) -> DistilConfig:
            return config

    config = configured()
    costs = costs_of(config)
    planned = make_plan(config, costs, parse_devices("1xA100-40GB", "devices")).seconds.phases
    rolled = 2 * sum(cost.round_passes(config, task)["rollout"].forward for task in config.tasks)
    seconds = {"rollout": 3 * 2 * planned["rollout"], "train": 3 * planned["train"]}  # twice the passes, all 3 x slower
    measured = Measured("one A100", "1xA100-40GB", seconds, rolled, ())
    setting = Setting("zero2", False, None, 1, 1, 1, None)
    monkeypatch.setattr(cost, "Costs", lambda model, config: costs)
    monkeypatch.setattr(cost, "fit", lambda config, costs, devices: (setting, make_plan(config, costs, devices)))
    monkeypatch.setattr(cost, "RUNS", (Tiny("Plain", ""), Tiny("Timed", "", measured=measured)))
    monkeypatch.setattr(cost, "CLUSTERS", ("1xA100-40GB", "2xH100-80GB"))
    found = cost.bench(tmp_path, lambda line: None, Prices.parse(["h100-80gb=2.5"]))
    assert found == json.loads((tmp_path / "cost.json").read_text())
    assert [row["assumed"] for row in found["rows"]] == [True, False] * 2
    assert [row["price_per_hour"] for row in found["rows"]] == [1.5, 2.5] * 2
    assert [row["correction"] for row in found["rows"]] == [None, None, pytest.approx(3), None]
    sheet = (tmp_path / "cost.md").read_text()
    assert sheet.count("not measured") == 2 * 3
    assert sheet.count("(x 3.00)") == 1
    assert "a buffered round on one A100" in sheet
    assert "40% of the bf16 peak" in sheet


@pytest.mark.parametrize("text", ["H100-80GB", "H100-80GB=much", "H101=2"])
def test_a_price_names_a_kind_and_a_number(text: str) -> None:
    with pytest.raises(UserError, match="--gpu-price"):
        Prices.parse([text])
