"""`python -m benchmarks families`: one family through everything, failures in their rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import families
from benchmarks.__main__ import app
from benchmarks.families import TOLERANCE, bench_families, train_all
from benchmarks.family_trial import Trial
from opd_ds.errors import UserError
from opd_ds.testing.tiny import sd3
from tests.ranks import TRAIN_MANY, launch


def train_in_forks(configs: list[Path], log: Path) -> str:
    """In place of the deepspeed launcher, under which `.ci/run` measures a family."""
    ended = launch(families.RANKS, *map(str, configs), script=TRAIN_MANY, check=False)
    log.write_text(ended.stdout)
    return f"the ranks ended with exit code {ended.returncode}"


@pytest.mark.slow  # `.ci/run` measures a family, under the launcher
@pytest.mark.multirank
def test_a_family_goes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_run_group", train_in_forks)
    assert bench_families(tmp_path, ["wan"], print)
    (good,) = json.loads((tmp_path / "families.json").read_text())
    assert (good["family"], good["error"], good["finite"]) == ("wan", None, True)
    assert abs(good["plan_error"]) < 0.01
    assert max(good["parity"], *good["export"].values()) <= TOLERANCE
    assert 0 < good["bf16"] < 0.1
    for kind in ("full", "lora"):
        assert good["zero3"][kind]["seconds"] > 0
        metrics = json.loads((tmp_path / "tiny_runs" / "wan" / kind / "metrics.jsonl").read_text())
        assert metrics["round"] == 1
        assert (
            tmp_path / "tiny_runs" / "wan" / kind / "checkpoints/round-000001/shard-00001-of-00002.safetensors"
        ).is_file()


def test_a_family_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a family that is as it should be, what is drawn and trained is told here, not found."""

    def broken(folder: Path, seed: int = 0) -> Path:
        raise RuntimeError("this pipeline is broken\nand here is how")

    def trained(configs: list[Path], log: Path) -> str:
        for config in configs:
            config.with_suffix(".json").write_text('{"seconds": 1.0}')
        return "the ranks ended with exit code 0"

    found = {"distance_to_diffusers": 1e-7, "bf16_difference": 0.01, "finite_at_both_ends": True, "plan_error": 0.0}
    for name, value in found.items():
        monkeypatch.setattr(Trial, name, lambda trial, value=value: value)
    monkeypatch.setattr(Trial, "distance_of_export", lambda trial, kind: 1e-7)
    monkeypatch.setattr(sd3, "write", broken)
    monkeypatch.setattr(families, "_run_group", trained)
    result = CliRunner().invoke(app, ["families", "--output-dir", str(tmp_path), "--family", "sd3", "--family", "wan"])
    assert result.exit_code == 1
    failed, good = json.loads((tmp_path / "families.json").read_text())
    assert failed == {"family": "sd3", "error": "RuntimeError: this pipeline is broken"}
    assert (good["family"], good["error"]) == ("wan", None)
    table = (tmp_path / "families.md").read_text()
    assert "| sd3 | - | - | - | - | - | - | - | - | RuntimeError: this pipeline is broken |" in table
    assert "| yes | +0.0% |  |" in table
    assert table in result.stdout


def test_a_run_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure ends its process group; what waits is trained in another, also where nothing could be said."""
    groups = []

    def fake(configs: list[Path], log: Path) -> str:
        groups.append([config.stem for config in configs])
        for config in configs:
            if config.stem == "killed":
                return "the ranks ended with exit code -9"
            ended = {"error": "UserError: no"} if config.stem == "bad" else {"seconds": 1.0}
            config.with_suffix(".json").write_text(json.dumps(ended))
            if config.stem == "bad":
                return "the ranks ended with exit code 2"
        return "the ranks ended with exit code 0"

    monkeypatch.setattr(families, "_run_group", fake)
    names = ["a", "bad", "b", "killed", "c"]
    ended = train_all([tmp_path / f"{name}.yaml" for name in names], tmp_path)
    assert groups == [names, names[2:], names[4:]]
    by_name = {config.stem: value for config, value in ended.items()}
    assert by_name["bad"] == {"error": "UserError: no"}
    assert by_name["killed"]["error"].startswith("the ranks ended with exit code -9; see ")
    assert [by_name[name] for name in "abc"] == [{"seconds": 1.0}] * 3


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--family wann: unknown; allowed: .*wan.*Did you mean"):
        bench_families(tmp_path, ["wann"], print)
