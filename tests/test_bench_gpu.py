"""`python -m benchmarks gpu`: the runner with parts that fail, hang and do not fit; the cheapest part; the counters."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.gpu import invariants, measure, report, runner, small
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.session import Session
from benchmarks.speed.worker import Loop
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.runs.setup import prepare

# A worker without libraries: parts are its functions.
WORKER = """
import json, sys, time

def good(told):
    json.dump({"one": {"value": 1.5}, "earlier": {"parts": list(told["earlier"])}}, open(told["out"], "w"))

def wrong(told):
    checks = {"two": {"ok": False}, "three": {"error": "ValueError: no | more", "traceback": "..."}}
    json.dump(checks, open(told["out"], "w"))

def fails(told):
    print("the last words")
    raise SystemExit(3)

def hangs(told):
    json.dump({"before": {"value": 1}}, open(told["out"], "w"))
    print("waiting", flush=True)
    time.sleep(600)

line = sys.stdin.readline()
if line.strip():
    told = json.loads(line)
    globals()[told["function"]](told)
"""


def _part(name: str, expected: float = 0.1, limit: float = 20.0) -> Part:
    return Part(name, f"what {name} is", name, expected, limit)


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "gpu_stub_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return "gpu_stub_worker"


def test_a_part_that_fails_or_hangs_stops_no_other(worker: str, tmp_path: Path) -> None:
    said: list[str] = []
    parts = [_part("fails"), _part("hangs", limit=1.0), _part("wrong"), _part("good"), _part("never", expected=1e6)]
    ok = runner.bench(parts, tmp_path / "out", size="tiny", minutes=2, say=said.append, module=worker)
    assert not ok
    data = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    statuses = {name: part["status"] for name, part in data.items()}
    assert statuses == {"fails": "failed", "hangs": "timed out", "wrong": "wrong", "good": "ok", "never": "not run"}
    assert data["fails"]["error"] == ["the last words"]
    assert data["hangs"]["checks"] == {"before": {"value": 1}}  # what was found before it was ended
    assert data["good"]["checks"]["earlier"]["parts"] == ["fails", "hangs", "wrong"]
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert "| never | what never is | not run | 0 |" in table
    assert "| three | ValueError: no \\| more |" in table
    assert "waiting" in (tmp_path / "out" / "log.txt").read_text()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.md", "log.txt"]
    assert said[-1].startswith("table: ")


def test_all_parts_within_the_time(worker: str, tmp_path: Path) -> None:
    parts = [_part("hangs", limit=600.0), _part("good", expected=30.0)]
    ok = runner.bench(parts, tmp_path / "out", size="tiny", minutes=0.1, say=lambda text: None, module=worker)
    data = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert not ok
    assert data["seconds"] < 6.5
    assert [part["status"] for part in data["parts"].values()] == ["timed out", "not run"]


def test_the_parts_exist_and_wrong_names_are_refused(tmp_path: Path) -> None:
    for part in PARTS:
        module, function = part.function.split(":")
        assert callable(getattr(import_module(f"benchmarks.gpu.{module}"), function))
        assert part.expected <= part.limit
    found = CliRunner().invoke(app, ["gpu", "--output-dir", str(tmp_path), "--part", "speed"])
    assert isinstance(found.exception, UserError)
    assert "versions, invariants" in str(found.exception)
    found = CliRunner().invoke(app, ["gpu", "--output-dir", str(tmp_path), "--size", "sd35m"])
    assert isinstance(found.exception, UserError)


@pytest.mark.slow  # `.ci/run` runs the command with all parts
def test_the_cheapest_part_on_this_machine(tmp_path: Path) -> None:
    """By the command, in a process of its own."""
    arguments = ["gpu", "--output-dir", str(tmp_path / "out"), "--part", "versions"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output + (tmp_path / "out" / "log.txt").read_text()
    parts = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert parts["versions"]["checks"]["torch"]["version"] == torch.__version__
    assert parts["versions"]["checks"]["bf16 matrix product"]["TFLOP/s"] > 0


@pytest.fixture
def session(tmp_path: Path, group: Group) -> Session:
    made = Session(tmp_path / "out.json", tmp_path, tmp_path, "miniature", 1000.0, {})
    made.__dict__["group"] = group
    return made


def test_a_check_that_raises_is_kept_with_its_traceback(session: Session) -> None:
    with session.check("bad"):
        raise ValueError("first line\nsecond")
    with session.check("good") as found:
        found["ok"] = True
    kept = json.loads(session.out.read_text())
    assert kept["bad"]["error"] == "ValueError: first line"
    assert "test_bench_gpu.py" in kept["bad"]["traceback"]
    assert kept["good"]["ok"] is True
    data = {"size": "x", "seconds": 1.0, "parts": {"p": {"what": "w", "status": "ok", "seconds": 1, "checks": kept}}}
    assert "traceback" not in report.as_markdown(data).lower()


def test_rounds_are_timed_by_phase_and_the_trainer_is_left_as_it_was(session: Session) -> None:
    all_steps = ("train.schedule=together", "rollout.trained_steps={fraction: 1.0}")  # so that rounds are alike
    config = small._config(session, "deepspeed=zero0", *all_steps)
    trainer = prepare(config, session.group).trainer
    measured = measure.time_rounds(Loop("ours", "ours", config, trainer), session, most=1, seconds=0)
    assert set(measured["phases"]) == {"encode", "rollout", "score", "train", "step"}
    assert sum(measured["phases"].values()) <= measured["round"]
    assert "_phase" not in vars(trainer)
    found: dict[str, Any] = {}
    planned = measure.Planned.of(config, session)
    session.earlier["versions"] = {"fp32 matrix product": {"TFLOP/s": 1.0}}
    measure.describe(found, measured, config, session, planned)
    phases = measure._passes(config)
    assert sum(passes.backward for passes in phases.values()) == measured["passes"]["backward"]
    assert sum(passes.forward for passes in phases.values()) == measured["passes"]["forward"]
    assert found["MFU train"] > 0


def test_what_comes_from_the_host_is_counted() -> None:
    with measure.HostToDevice() as counter:
        there = torch.ones(10).to("meta")
        there.copy_(torch.ones(10))
        there + there
        torch.ones(3) + 1
    assert counter.nbytes == 80


def test_the_micro_batch_is_the_largest_that_fits_by_the_plan(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small._config(session)
    planned = measure.Planned.of(config, session)
    whole = planned.devices.kind.memory
    monkeypatch.setattr(measure.Planned, "peak", lambda self, config: whole * config.train.micro_batch / 10)
    assert planned.micro_batch(config, (9, 6, 1)) == 6
    assert planned.micro_batch(config, (9, 6, 1), share=0.95) == 9
    assert planned.micro_batch(config, (9, 6, 1), share=0.01) == 1


def test_placements_are_those_of_the_schema() -> None:
    assert {"resident", "offload", "stream", "zero_inference"} <= set(invariants.placements())


def test_a_difference_that_is_not_a_number_is_not_small() -> None:
    expected = {"loss": [1.0, 2.0]}
    assert invariants._difference({"loss": [1.0, 2.1]}, expected) == pytest.approx(0.05)
    assert invariants._difference({"loss": [float("nan"), 2.0]}, expected) == float("inf")
