"""Intervals that cover, averages by hand, tests that find what is there and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.errors import UserError
from opd_ds.evaluation.compare import compare, compare_files
from opd_ds.evaluation.results import FORMAT, Results
from opd_ds.evaluation.statistics import (
    bootstrap_interval,
    holm,
    normalised_average,
    normalised_columns,
    paired_p_value,
)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """300 samples of 60 from a skewed distribution of mean 1: about 95 % of the intervals hold 1."""
    generator = np.random.default_rng(0)
    intervals = [bootstrap_interval(generator.exponential(1.0, 60), seed=k) for k in range(300)]
    covered = np.mean([low <= 1.0 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.98


def test_the_interval_is_that_of_the_normal_approximation_for_many_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert (low, high) == bootstrap_interval(values)  # seeded


def test_one_value_has_no_interval() -> None:
    assert np.isnan(bootstrap_interval(np.array([1.0]))).all()


def test_the_normalised_average_by_hand() -> None:
    table: dict[str, list[float | None]] = {
        "a": [0.2, 20.0, 1.0, None],
        "b": [0.6, 23.0, 1.0, 3.0],
        "c": [0.4, 22.0, 1.0, 4.0],
    }
    # The third metric is the same for all, the fourth is not there for all: both are left out.
    average = normalised_average(table)
    assert average == pytest.approx({"a": 0.0, "b": 1.0, "c": (0.5 + 2 / 3) / 2})
    assert normalised_columns(table)[0] == [0, 1]
    assert normalised_average({"a": [1.0], "b": [1.0]}) == {"a": None, "b": None}
    assert normalised_average({"a": [], "b": []}) == {"a": None, "b": None}


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=1, max_size=5))
def test_the_normalised_average_stays_within_0_and_1(columns: list[list[float]]) -> None:
    table: dict[str, list[float | None]] = {name: [c[k] for c in columns] for k, name in enumerate("abc")}
    assert all(value is None or 0 <= value <= 1 for value in normalised_average(table).values())


def test_the_permutation_test_agrees_with_all_arrangements() -> None:
    """Ten pairs have 1024 arrangements, which can be counted."""
    differences = np.array([0.3, -0.1, 0.5, 0.2, 0.4, -0.2, 0.6, 0.1, 0.3, 0.2])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1).T
    exact = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12)
    assert paired_p_value(differences) == pytest.approx(exact, abs=0.006)


def test_under_the_null_p_is_uniform() -> None:
    generator = np.random.default_rng(2)
    p_values = np.array([paired_p_value(generator.normal(0, 1, 30), seed=k) for k in range(200)])
    assert 0.01 <= np.mean(p_values < 0.05) <= 0.1
    assert 0.4 <= np.median(p_values) <= 0.6
    assert paired_p_value(np.zeros(10)) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


# ---- comparing files ----


def results_of(generator: np.random.Generator, identity: str, shifts: dict[str, float], prompts: int = 80) -> Results:
    """A results.json with one model on one set, three rewards; `shifts` are added to a reward's scores."""
    shared = np.random.default_rng(99).normal(0.5, 0.2, (3, prompts))  # easy and hard prompts are so for every model
    labels = ["alpha", "beta", "gamma"]
    scores = {
        label: {"per_prompt": (shared[k] + generator.normal(0, 0.1, prompts) + shifts.get(label, 0.0)).tolist()}
        for k, label in enumerate(labels)
    }
    return {
        "format": FORMAT,
        "settings": {"steps": 4},
        "models": {"student": {"identity": identity}, "base": {"identity": "0"}},
        "rewards": {label: {"engine": label} for label in labels},
        "sets": {"task": {"prompts": [f"prompt {k}" for k in range(prompts)], "rewards": labels, "own": labels}},
        "scores": {"student": {"task": scores}, "base": {"task": copy.deepcopy(scores)}},
    }


def test_compare_finds_the_planted_difference_and_only_that() -> None:
    generator = np.random.default_rng(3)
    a, b = results_of(generator, "1", {}), results_of(generator, "2", {"beta": 0.1})
    differences, notes = compare(a, b, [("student", "student")])
    found = {d.reward: d for d in differences}
    assert {label for label, d in found.items() if d.significant} == {"beta"}
    assert found["beta"].mean == pytest.approx(0.1, abs=0.04)
    assert found["beta"].interval[0] < 0.1 < found["beta"].interval[1]
    assert notes == []


def test_compare_of_equals_finds_something_in_one_of_twenty_at_most() -> None:
    """The family-wise error over three metrics, 100 comparisons."""
    generator = np.random.default_rng(4)
    alarms = 0
    for _ in range(100):
        a, b = results_of(generator, "1", {}, 25), results_of(generator, "2", {}, 25)
        alarms += any(d.significant for d in compare(a, b, [("student", "student")])[0])
    assert alarms <= 11


def test_compare_pairs_by_prompt_and_says_what_it_leaves_out() -> None:
    generator = np.random.default_rng(5)
    a, b = results_of(generator, "1", {}), results_of(generator, "2", {})
    b["sets"]["task"]["prompts"].reverse()
    for entry in b["scores"]["student"]["task"].values():
        entry["per_prompt"].reverse()
    reversed_b, _ = compare(a, b, [("student", "student")])
    assert all(abs(d.mean) < 0.05 and not d.significant for d in reversed_b)
    b["rewards"]["alpha"] = {"engine": "another"}
    b["scores"]["student"]["task"]["gamma"]["per_prompt"][0] = None
    b["settings"]["steps"] = 5
    b["sets"]["task"]["prompts"][1] = "unheard of"
    differences, notes = compare(a, b, [("student", "student")])
    assert {d.reward: d.n for d in differences} == {"beta": 79, "gamma": 78}
    assert any("steps: 4 and 5" in note for note in notes)
    assert any("alpha: measured by two different rewards" in note for note in notes)


def test_compare_reads_files_and_models(tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    files = []
    for name, shift in (("a", 0.0), ("b", 0.2)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(results_of(generator, name, {"alpha": shift})))
        files.append(str(file))
    differences, notes = compare_files(*files)
    first = differences[0]
    assert (first.models, first.reward, first.significant) == (("student", "student"), "alpha", True)
    assert notes == ["base and base are the same weights: not compared"]
    for arguments in ([], ["--json"]):
        result = CliRunner().invoke(app, ["eval", "--compare", *files, *arguments])
        assert result.exit_code == 0
        assert "base and base are the same weights" in result.output
        assert max(map(len, result.output.splitlines()[:12])) <= 80
    (row,) = [one for one in json.loads(result.output)["differences"] if one["reward"] == "alpha"]
    assert row["significant"]
    assert row["p"] == first.p
    within, _ = compare_files(f"{files[0]}#base", f"{files[0]}#student")
    assert {d.models for d in within} == {("base", "student")}
    assert not any(d.significant for d in within)  # the same scores under two names
    with pytest.raises(UserError, match="no model 'teacher'; there are student, base"):
        compare_files(f"{files[0]}#teacher", files[1])
    with pytest.raises(UserError, match="does not exist"):
        compare_files(str(tmp_path / "gone.json"), files[1])
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(UserError, match="not a results file"):
        compare_files(str(tmp_path / "odd.json"), files[1])


def test_differences_within_the_uncertainty_are_not_stretched() -> None:
    table: dict[str, list[float | None]] = {"a": [0.50, 0.2], "b": [0.51, 0.8], "c": [0.505, 0.5]}
    kept, normalised = normalised_columns(table, widths=[0.1, 0.1])
    assert kept == [0, 1]
    assert normalised == {
        "a": [pytest.approx(0.45), pytest.approx(0.0)],
        "b": [pytest.approx(0.55), pytest.approx(1.0)],
        "c": [pytest.approx(0.5), pytest.approx(0.5)],
    }
    assert normalised_average(table)["b"] == 1.0  # without widths: min-max, as in the paper
