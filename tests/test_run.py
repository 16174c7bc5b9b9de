"""A whole run in one process: files, checkpoints, resume, rewards that only watch."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.files import recipe_names
from opd_ds.config.loading import load_config
from opd_ds.engine import Group
from opd_ds.errors import IncompleteError, UserError
from opd_ds.evaluation.tables import gain_kept
from opd_ds.runs.train import train
from tests.runs import metrics
from tests.tiny import run_settings, write_config

Run = Callable[..., Path]


@pytest.fixture
def run(tiny_world: Path, tmp_path: Path, group: Group) -> Run:
    def start(name: str, resume: str = "never", **changes: Any) -> Path:
        folder, few = tmp_path / name, {"rollout__steps": 2}
        train(DistilConfig.model_validate(run_settings(tiny_world, folder, **few | changes)), group, resume)
        return folder

    return start


def with_reward(world: Path, reward: str) -> dict[str, Any]:
    prompts = str(world / "prompts.txt")
    return {"teacher": str(world / "other"), "prompts": prompts, "eval_prompts": prompts, "rewards": [reward]}


def test_a_run_leaves_what_it_promises(run: Run, tiny_world: Path) -> None:
    folder = run(
        "out",
        tasks={"one": with_reward(tiny_world, "miniature_look")},
        run__rounds=4,
        run__checkpoint_every=1,
        run__keep_checkpoints=2,
        run__eval_every=2,
        run__image_every=2,
        evaluation__baselines=True,
    )
    assert [row["round"] for row in metrics(folder)] == [1, 2, 3, 4]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["latest", "round-000003", "round-000004"]
    assert (folder / "checkpoints" / "latest").read_text().strip() == "round-000004"
    data = json.loads((folder / "summary.json").read_text())
    assert data["tasks"].keys() == {"one"}
    assert all(isinstance(data["tasks"]["one"][key], float) for key in ("base", "teacher", "student"))
    assert data["models"].keys() == {"base", "teacher:one", "student"}
    resolved = DistilConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text()))
    assert resolved.run.rounds == 4
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    expected = {"loss", "grad_norm", "task/one/kl", "step_kl/one/00", "learning_rate", "seconds/rollout"}
    assert {*expected, "reward/one/miniature_look"} <= set(tags["scalars"])
    assert "memory/host_peak_gib" in tags["scalars"]
    assert {"student", "models"} <= set(tags["images"])
    assert any("config" in tag for tag in tags["tensors"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


def test_a_profiled_round_says_where_it_went(run: Run) -> None:
    folder = run("out", run__rounds=2, run__profile={"rounds": [2]})
    assert metrics(folder) == metrics(run("other", run__rounds=2))
    [place] = (folder / "profile").iterdir()
    assert place.name == "round-000002"
    events = json.loads(gzip.decompress((place / "rank-00000.trace.json.gz").read_bytes()))["traceEvents"]
    seen = {event.get("name") for event in events}
    assert {"round/rollout", "round/train", "round/step", "aten::mm"} <= seen
    summary = (place / "summary.md").read_text()
    shares = [int(share) for share in re.findall(r"^\| \w+ \| [\d.]+ \| (\d+) % \| [\d.]+ \|", summary, re.M)]
    assert 97 <= sum(shares) <= 103, summary
    assert re.search(r"^\| aten::\w+ \| \d+ \| \d", summary, re.M)
    with pytest.raises(ValueError, match="the run ends after round 3"):
        run("late", run__profile={"rounds": [4]})


def test_rewards_decide_nothing(run: Run, tiny_world: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Invariant 7: with a reward, without, and with one that breaks, a run's numbers are the same."""

    class Broken:
        name = "broken"

        def identity(self) -> dict[str, Any]:
            return {"engine": "none"}

        def score(self, *_: Any) -> torch.Tensor:
            raise RuntimeError("the server is gone")

    task = with_reward(tiny_world, "miniature_look")
    watched = run("watched", tasks={"one": task}, run__eval_every=1, evaluation__baselines=True)
    silent = run("silent", tasks={"one": task | {"rewards": []}})
    monkeypatch.setattr("opd_ds.runs.rewards.build", lambda name, **_: Broken())
    with pytest.raises(IncompleteError, match="no image has a score by miniature_look"):
        run("broken", tasks={"one": task}, run__eval_every=1)
    broken = watched.parent / "broken"
    assert metrics(watched) == metrics(silent) == metrics(broken)
    assert "the server is gone" in caplog.text
    assert json.loads((broken / "summary.json").read_text())["tasks"]["one"]["student"] is None


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_resume_is_bit_for_bit_at_every_stage(run: Run, tmp_path: Path, stage: str) -> None:
    """Invariant 2 in one process; LoRA, bf16, a schedule and an EMA that acts every second step."""
    settings: dict[str, Any] = {
        "deepspeed": stage,
        "precision": "bf16",
        "student__kind": "lora",
        "student__ema": {"decay": 0.9, "every": 2},
        "optimizer__warmup_rounds": 3,
        "run__checkpoint_every": 1,
        "run__keep_checkpoints": 10,
        "run__rounds": 4,
    }
    whole = run("whole", **settings)
    exported = load_file(whole / "export" / "pytorch_lora_weights.safetensors")
    middle = whole / "checkpoints" / "round-000002"
    again = run("again", resume=str(middle), **settings)
    assert metrics(again) == metrics(whole)[2:]
    # Not the files' bytes: safetensors writes the entries of its header's metadata in any order.
    resumed = load_file(again / "export" / "pytorch_lora_weights.safetensors")
    assert resumed.keys() == exported.keys()
    assert all(torch.equal(resumed[key], value) for key, value in exported.items())


def test_resume_auto_of_a_finished_run_trains_nothing_more(run: Run) -> None:
    first = metrics(run("out"))
    assert metrics(run("out", resume="auto")) == first
    with pytest.raises(UserError, match=r"already holds .*round-000003; give --resume auto"):
        run("out")


def test_resume_needs_a_checkpoint(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no state\.json there"):
        run("out", resume=str(tmp_path))


def test_a_cut_off_last_metrics_line_is_left_out(run: Run) -> None:
    folder = run("out", run__rounds=3, run__checkpoint_every=2)
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text()[:-20])
    run("out", resume="auto", run__rounds=4, run__checkpoint_every=2)
    assert [row["round"] for row in metrics(folder)][-1] == 4


def test_gain_kept() -> None:
    assert gain_kept({"base": 0.2, "teacher": 0.6, "student": 0.5}) == pytest.approx(0.75)
    assert gain_kept({"base": 0.2, "teacher": 0.6, "student": 0.5}, uncertain=0.5) is None
    assert gain_kept({"base": 0.6, "teacher": 0.6, "student": 0.5}) is None
    assert gain_kept({"base": None, "teacher": 0.6, "student": 0.5}) is None


# ---- the command ----


def test_dry_run_prints_arithmetic_and_starts_nothing(tiny_world: Path, tmp_path: Path) -> None:
    data = run_settings(tiny_world, tmp_path / "out", rollout__samples=5)
    file = write_config(tmp_path / "run.yaml", data)
    result = CliRunner().invoke(app, ["train", "--config", str(file), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "20 (state, step) pairs per task and process" in result.output
    assert "3 micro-batches of 8 per task and process, 1 x, and 1 optimizer steps" in result.output
    assert '"train_micro_batch_size_per_gpu": 8' in result.output
    assert not (tmp_path / "out").exists()


def test_dry_run_finds_missing_files(tiny_world: Path, tmp_path: Path) -> None:
    data = run_settings(tiny_world, tmp_path / "out")
    data["tasks"]["one"]["prompts"] = str(tmp_path / "gone.txt")
    file = write_config(tmp_path / "run.yaml", data)
    result = CliRunner().invoke(app, ["train", "--config", str(file), "--dry-run"])
    assert isinstance(result.exception, UserError)
    assert "tasks.one.prompts" in str(result.exception)


def test_recipes_are_listed() -> None:
    result = CliRunner().invoke(app, ["recipes"])
    lines = result.output.splitlines()
    assert any(line.startswith("mopd_sd35m ") and "SD3.5-Medium" in line for line in lines)
    assert len(lines) == len(recipe_names())
    assert not any(line.startswith("_") for line in lines)  # parts of recipes
    assert load_config("miniature", None, []).deepspeed == "ds_configs/miniature.json"


def test_a_run_without_rewards_shows_no_empty_tables(
    run: Run, tiny_world: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "opd_ds")
    prompts = str(tiny_world / "prompts.txt")
    task = {"teacher": str(tiny_world / "other"), "prompts": prompts, "eval_prompts": prompts}
    folder = run("out", tasks={"one": task}, run__rounds=1, evaluation__baselines=True)
    said = capsys.readouterr().out
    assert "training: 1 of 1 rounds" in caplog.text
    assert "held-out rewards" not in caplog.text
    assert "mean reward" not in said
    assert sorted(file.name for file in (folder / "eval").glob("results.*")) == ["results.json"]
    report = (folder / "eval" / "report.html").read_text()
    assert 'id="summary"' not in report
    assert 'id="extremes"' not in report
    assert report.count('class="tile"') == 3 * 5  # base, teacher and student on every prompt
