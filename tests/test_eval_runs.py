"""Evaluations of runs: checkpoints and exports, the run's own evaluation, baselines, averages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opd_ds.config.algorithms import DistilConfig
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.evaluation.pictures import Painter
from opd_ds.evaluation.results import read_results
from opd_ds.runs.evaluate import Choice, evaluate
from opd_ds.runs.model_specs import Requests
from opd_ds.runs.train import train
from tests.evaluations import means, settings


@pytest.mark.parametrize(
    ("stage", "precision", "kind"),
    [("zero0", "fp32", "full"), ("zero1", "bf16", "lora"), ("zero2", "fp32", "lora"), ("zero3", "bf16", "full")],
)
def test_a_checkpoint_is_its_export(
    tiny_world: Path, tmp_path: Path, group: Group, stage: str, precision: str, kind: str
) -> None:
    """After the last round the averaged weights of checkpoint and export draw the same images."""
    data = settings(
        tiny_world,
        tmp_path / "out",
        student__kind=kind,
        deepspeed=stage,
        precision=precision,
        optimizer__lr=3e-2,
        student__ema={"decay": 0.5},
    )
    config = DistilConfig.model_validate(data)
    train(config, group)
    models = Requests(defaults=False, models=["student", "last=checkpoint:latest", "base"])
    evaluate(config, Choice(models, limit=3), group)
    images = tmp_path / "out" / "eval-2" / "images"  # the run has evaluated itself into eval/

    def pictures(model: str) -> np.ndarray[Any, Any]:
        files = [images / model / task / f"0000{number}-0.png" for task in ("one", "two") for number in range(3)]
        return np.stack([np.asarray(Image.open(file), dtype=np.int64) for file in files])

    assert np.abs(pictures("student") - pictures("last")).max() <= (1 if precision == "fp32" else 3)
    assert np.abs(pictures("student") - pictures("base")).max() > 12


def test_the_runs_own_evaluation_is_this_one(
    tiny_world: Path, tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run ends with results.json and report; `opd-ds eval` afterwards draws nothing and finds the same scores."""
    config = DistilConfig.model_validate(settings(tiny_world, tmp_path / "out", evaluation__baselines=True))
    train(config, group)
    own = read_results(tmp_path / "out" / "eval" / "results.json")
    assert (tmp_path / "out" / "eval" / "report.html").is_file()
    assert (tmp_path / "out" / "grid.png").is_file()
    monkeypatch.setattr(Painter, "draw", lambda *_: pytest.fail("an image was drawn"))
    again = evaluate(config, Choice(), group)
    assert means(own).items() <= means(again).items()
    data = json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]["two"]
    assert data["teacher"] == means(own)["teacher:two/two/miniature_composition"]
    assert data["student"] == means(own)["student/two/miniature_composition"]


def test_a_resumed_run_keeps_its_baselines(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    changes = {"evaluation__baselines": True, "run__checkpoint_every": 1}
    config = DistilConfig.model_validate(settings(tiny_world, tmp_path / "out", **changes, run__rounds=1))
    train(config, group)
    before = means(read_results(tmp_path / "out" / "eval" / "results.json"))
    config = DistilConfig.model_validate(settings(tiny_world, tmp_path / "out", **changes, run__rounds=2))
    train(config, group, "auto")
    after = means(read_results(tmp_path / "out" / "eval" / "results.json"))
    same = [key for key in before if not key.startswith("student")]
    assert [before[key] for key in same] == [after[key] for key in same]
    assert before.keys() == after.keys()


def test_raw_weights_are_another_model_than_their_average(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    changes = {"run__rounds": 2, "run__checkpoint_every": 2, "student__ema": {"decay": 0.9}, "optimizer__lr": 0.1}
    config = DistilConfig.model_validate(settings(tiny_world, tmp_path / "out", **changes))
    train(config, group)
    it = [Requests(defaults=False, models=["it=checkpoint:2"], raw=raw) for raw in (False, True)]
    average, raw = (evaluate(config, Choice(one, limit=2, output=tmp_path / str(one.raw)), group) for one in it)
    assert raw["models"]["it"]["identity"] != average["models"]["it"]["identity"]
    pixels = [np.asarray(Image.open(tmp_path / str(raw) / "images/it/one/00000-0.png")) for raw in (False, True)]
    assert (pixels[0] != pixels[1]).any()
    with pytest.raises(UserError, match="--raw: no model is a checkpoint that keeps an average"):
        evaluate(config, Choice(Requests(defaults=False, models=["student"], raw=True)), group)
