"""Trackers: what a run leaves in each, read back as its own reader reads it; and that none can harm a run.

TensorBoard, failures and checks are always tested. The others need their packages, which may pull other versions of
shared libraries: `pip install -e '.[wandb,trackio,swanlab,mlflow]'` in an environment of its own, then this file.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import pytest
from PIL.Image import Image, new
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.sections import TrackerSection
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.runs import trackers
from opd_ds.runs.trackers import BackgroundTracker, TrackedRun, Tracker, background, check_trackers
from opd_ds.runs.trackers.repeats import WithoutRepeats
from opd_ds.runs.train import train
from opd_ds.utils.secrets import without_secrets
from tests.runs import metrics
from tests.tiny import run_settings, write_config

Track = Callable[..., Path]


@pytest.fixture
def tracked(tiny_world: Path, tmp_path: Path, group: Group) -> Track:
    """Two rounds with an image each, then the second again and one more, in a run resumed after the first."""

    def start(name: str) -> Path:
        folder = tmp_path / "my-run"
        prompts = str(tiny_world / "prompts.txt")
        task = {"teacher": str(tiny_world / "other"), "prompts": prompts, "eval_prompts": prompts}
        for rounds, resume in ((2, "never"), (3, str(folder / "checkpoints" / "round-000001"))):
            settings = run_settings(
                tiny_world,
                folder,
                tasks={"one": task},
                run__rounds=rounds,
                run__image_every=1,
                run__checkpoint_every=1,
                trackers=[{"name": name, "offline": True, "project": "merging"}],
            )
            train(DistilConfig.model_validate(settings), group, resume)
        return folder

    return start


# Of the student after rounds 1 and 2, and of all models at the end of both starts.
GRIDS = ("student", "models")


def once(seen: list[tuple[int, float]], folder: Path) -> None:
    """Every round's loss is there, the repeated one's too, and no second time."""
    wanted = [(int(row["round"]), row["loss"]) for row in metrics(folder)]
    assert [index for index, _ in wanted] == [1, 2, 3]
    assert sorted(seen) == [(index, pytest.approx(loss)) for index, loss in wanted]


# ---- each in its own reader ----


def test_wandb(tracked: Track) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    folder = tracked("wandb")
    files = sorted((folder / "trackers" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "a resumed run has another id"
    seen: list[tuple[int, float]] = []
    images, config = 0, {}
    for file in files:
        for data in leveldb_log(file.read_bytes()):
            record = Record.FromString(data)
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if "loss" in row:
                seen.append((row["round"], row["loss"]))
            images += sum(f"{grid}.path" in row for grid in GRIDS)
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    once(seen, folder)
    assert images == 4
    assert config["optimizer"]["lr"] == 1e-3


def test_trackio(tracked: Track, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    for module in [module for name, module in sys.modules.items() if name.startswith("trackio")]:
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
        if hasattr(module, "MEDIA_DIR"):
            monkeypatch.setattr(module, "MEDIA_DIR", tmp_path / "trackio" / "media")
    assert tmp_path / "trackio" == utils.TRACKIO_DIR
    folder = tracked("trackio")
    [name] = SQLiteStorage.get_runs("merging")
    assert name.startswith("my-run-")
    rows = SQLiteStorage.get_logs("merging", name)
    once([(row["step"], row["loss"]) for row in rows if "loss" in row], folder)
    assert sum(grid in row for row in rows for grid in GRIDS) == 4
    assert SQLiteStorage.get_run_config("merging", name)["optimizer"]["lr"] == 1e-3


def test_swanlab(tracked: Track) -> None:
    pytest.importorskip("swanlab")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    folder = tracked("swanlab")
    files = sorted((folder / "trackers" / "swanlab").glob("run-*/run-*.swanlab"))
    assert len({file.name for file in files}) == 1, "a resumed run has another id"
    seen: list[tuple[int, float]] = []
    images = 0
    for file in files:
        reader = DataStoreReader()
        reader.open(file)
        for data in reader:
            record = Record.FromString(data)
            if record.scalar.key == "loss":
                seen.append((record.scalar.step, record.scalar.value.number))
            images += record.media.key in GRIDS
        reader.close()
    once(seen, folder)
    assert images == 4
    assert "lr: 0.001" in (files[0].parent / "files" / "config.yaml").read_text()


def test_mlflow(tracked: Track) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    from mlflow import MlflowClient

    folder = tracked("mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'trackers' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("merging")
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("my-run", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss")
    once([(point.step, point.value) for point in history], folder)
    assert run.data.params["optimizer.lr"] == "0.001"
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert sum(path.removeprefix("images/").startswith(GRIDS) and path.endswith(".png") for path in images) == 4


def leveldb_log(data: bytes) -> list[bytes]:
    """The records of a W&B file: LevelDB's log format, blocks of 32 KiB, behind a header of 7 bytes."""
    records, part, place = [], b"", 7
    while place < len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(part)
            part = b""
    return records


# ---- what a resumed run repeats ----


class Kept(Tracker):
    """Keeps all it gets."""

    def __init__(self) -> None:
        self.records: list[tuple[int, str]] = []

    def scalars(self, values: Mapping[str, float], round_index: int) -> None:
        if "broken" in values:
            raise ConnectionError("the network is gone")
        self.records += [(round_index, name) for name in values]

    def image(self, tag: str, image: Image, round_index: int) -> None:
        self.records.append((round_index, tag))

    def close(self, *, failed: bool) -> None: ...


def test_what_a_resumed_run_repeats_is_not_recorded_twice(tmp_path: Path) -> None:
    kept, file = Kept(), tmp_path / "trackers" / "kept.records"
    first = WithoutRepeats(kept, file, goes_on=False)
    first.scalars({"loss": 1.0, "grad_norm": 2.0}, 1)
    first.scalars({"loss": 0.5, "grad_norm": 2.0}, 2)
    first.image("student", new("RGB", (2, 2)), 2)
    with pytest.raises(ConnectionError):
        first.scalars({"broken": 1.0}, 2)  # not recorded, so a later attempt may try again
    second = WithoutRepeats(kept, file, goes_on=True)  # killed, not closed
    second.scalars({"loss": 0.5, "grad_norm": 2.0}, 2)
    second.image("student", new("RGB", (2, 2)), 2)
    second.scalars({"reward/text/ocr": 0.1}, 2)  # the first attempt did not come so far
    second.scalars({"loss": 0.25, "grad_norm": 1.0}, 3)
    with pytest.raises(ConnectionError):
        second.scalars({"broken": 1.0}, 2)
    second.close(failed=False)
    once = [(1, "loss"), (1, "grad_norm"), (2, "loss"), (2, "grad_norm"), (2, "student")]
    assert kept.records == [*once, (2, "reward/text/ocr"), (3, "loss"), (3, "grad_norm")]
    anew = WithoutRepeats(Kept(), file, goes_on=False)  # another run in this folder
    anew.close(failed=False)
    assert file.read_text() == ""


# ---- what goes wrong ----


class Broken(Tracker):
    """Fails at every record."""

    def __init__(self, section: TrackerSection | None = None, run: TrackedRun | None = None) -> None:
        self.closed: bool | None = None

    def scalars(self, values: Mapping[str, float], round_index: int) -> None:
        raise ConnectionError("the network is gone")

    def image(self, tag: str, image: Image, round_index: int) -> None:
        raise SystemExit("a library that ends processes")

    def close(self, *, failed: bool) -> None:
        self.closed = failed


def test_a_run_outlives_its_tracker(
    tiny_world: Path, tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("opd_ds.runs.trackers.tensorboard.TensorBoard", Broken)
    train(DistilConfig.model_validate(run_settings(tiny_world, tmp_path / "out")), group)
    assert len(metrics(tmp_path / "out")) == 3
    told = [record.message for record in caplog.records if "tracker tensorboard" in record.message]
    assert told == [
        "tracker tensorboard failed (ConnectionError: the network is gone); the run goes on, all numbers are in "
        "metrics.jsonl",
        "tracker tensorboard: 4 of 4 records are lost; all numbers are in metrics.jsonl",  # and the passes
    ]


def test_a_tracker_that_ends_processes_or_does_not_start(caplog: pytest.LogCaptureFixture) -> None:
    broken = Broken()
    tracker = BackgroundTracker("x", lambda: broken)
    tracker.image("grid", new("RGB", (4, 4)), 1)
    assert tracker.close(failed=True) == 1
    assert broken.closed is True
    assert "SystemExit: a library that ends processes" in caplog.text

    def start() -> Tracker:
        raise ValueError("no account")

    tracker = BackgroundTracker("y", start)
    for index in range(5):
        tracker.scalars({"loss": 1.0}, index)
    assert tracker.close(failed=False) == 5
    assert caplog.text.count("tracker y did not start (ValueError: no account)") == 1


def test_a_tracker_that_hangs_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.05)
    answer = threading.Event()

    class Hanging(Broken):
        def scalars(self, values: Mapping[str, float], round_index: int) -> None:
            answer.wait()

    tracker = BackgroundTracker("z", Hanging)
    for index in range(4):
        tracker.scalars({}, index)
    assert tracker.close(failed=False) == 4
    answer.set()
    assert "tracker z: 4 of 4 records are lost" in caplog.text


def test_trackers_are_checked_before_a_run(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    file = write_config(tmp_path / "run.yaml", run_settings(tiny_world, tmp_path / "out", trackers=["wandb"]))
    result = CliRunner().invoke(app, ["train", "--config", str(file), "--dry-run"])
    assert isinstance(result.exception, UserError)
    assert "trackers: wandb needs the package 'wandb': pip install 'opd-ds[wandb]'" in str(result.exception)
    with pytest.raises(UserError, match=r"tensorboard\.options: 'flush_sec' is not one of .*mean 'flush_secs'"):
        check_trackers([TrackerSection(name="tensorboard", options={"flush_sec": 1})])
    with pytest.raises(ValueError, match="'tensorboard' is named twice"):
        DistilConfig.model_validate(run_settings(tiny_world, tmp_path, trackers=["tensorboard", "tensorboard"]))


def test_no_tracker_at_all(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    train(DistilConfig.model_validate(run_settings(tiny_world, tmp_path / "out", trackers=[])), group)
    assert len(metrics(tmp_path / "out")) == 3
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_secrets_stay_here() -> None:
    shown = without_secrets(
        {
            "rewards": [{"options": {"api_key": "sk-1", "base_url": "https://me:word@host/v1", "max_tokens": 5}}],
            "tracker": {"options": {"HF_TOKEN": "hf_x", "url": "http://host/?write_token=abc&x=1"}},
            "api_key_variable": "OPENAI_API_KEY",
        }
    )
    assert shown == {
        "rewards": [{"options": {"api_key": "***", "base_url": "https://***@host/v1", "max_tokens": 5}}],
        "tracker": {"options": {"HF_TOKEN": "***", "url": "http://host/?write_token=***&x=1"}},
        "api_key_variable": "OPENAI_API_KEY",
    }


def test_every_tracker_of_the_config_is_known() -> None:
    names = get_args(TrackerSection.model_fields["name"].annotation)
    assert set(names) == set(trackers._KNOWN)
    assert trackers.places([TrackerSection(name="mlflow", offline=True)], Path("runs/x")) == {
        "mlflow": "mlflow ui --backend-store-uri sqlite:///runs/x/trackers/mlflow.db"
    }
