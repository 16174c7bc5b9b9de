"""What a run's rewards need: by command, in the recipes' own words, and in the doctor's report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.config.files import recipe_names
from opd_ds.config.loading import load_config
from opd_ds.config.paths import package_root
from opd_ds.doctor.rewards import look_at_rewards


@pytest.fixture(autouse=True)
def _no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_DS_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)


def check(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["rewards", "check", *arguments])
    return result.exit_code, result.output


def test_a_recipes_needs_hold_those_of_its_probes() -> None:
    code, output = check("--recipe", "guard_sd35m_ocr", "--json")
    rows = {row["reward"]: row for row in json.loads(output)}
    assert code == 1
    assert list(rows) == ["ocr", "geneval", "pickscore", "clipscore", "hpsv2"]
    assert (rows["ocr"]["asked_by"], rows["ocr"]["absent"]) == (["tasks.ocr"], [])
    assert (rows["geneval"]["asked_by"], len(rows["geneval"]["absent"])) == (["probes.geneval"], 2)  # both its files
    assert len(rows["hpsv2"]["absent"]) == 2
    code, output = check("--recipe", "guard_sd35m_ocr")
    assert len(output.splitlines()) == 7
    assert output.startswith("ocr (tasks.ocr): ready\ngeneval (probes.geneval): reward 'geneval': weights not found: ")


def test_a_run_that_needs_nothing_says_so() -> None:
    assert check("--recipe", "mopd_sd35m") == (0, "no rewards: this run needs none\n")
    code, output = check("--recipe", "miniature")
    assert (code, output.count(": ready")) == (0, 4)


def test_options_are_checked_too() -> None:
    code, output = check("--recipe", "miniature", "--set", "tasks.text.rewards=[{name: remote, options: {uri: x}}]")
    assert code == 1
    assert "reward 'remote': unknown option 'uri'" in output


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_head_of_a_recipe_names_its_rewards(recipe: str) -> None:
    text = (package_root() / "recipes" / f"{recipe}.yaml").read_text()
    head = text.partition("\nextends")[0].partition("\nrun")[0]
    asked = {reward.name for reward in load_config(recipe, None, []).rewards.values()}
    foreign = {name for name in asked if not name.startswith("miniature_")}
    assert all(name in head for name in foreign)


def test_the_doctor_looks_at_rewards() -> None:
    seen = {one.what: one for one in look_at_rewards(load_config("guard_sd35m_ocr", None, []))}
    assert (seen["reward ocr"].found, seen["reward ocr"].problem) == ("ready, for tasks.ocr", None)
    assert seen["reward geneval"].found == "not ready, for probes.geneval"
    assert "weights not found: mask2former" in str(seen["reward geneval"].problem)
