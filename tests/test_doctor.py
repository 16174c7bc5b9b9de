"""What `opd-ds doctor` finds, and a torchvision that does not load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opd_ds.cli import app
from opd_ds.doctor import examine


@pytest.fixture
def broken_torchvision(tmp_path: Path) -> dict[str, str]:
    """An environment in which torchvision is installed and fails to import as its wheels do beside another torch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "from torchvision import ops\nraise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    (tmp_path / "torchvision" / "ops.py").write_text("")
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
    )
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def test_a_broken_torchvision_takes_nothing_down(broken_torchvision: dict[str, str]) -> None:
    code = (
        "import opd_ds; from transformers import CLIPModel; from diffusers import StableDiffusion3Pipeline; "
        "import peft, importlib.util; print(opd_ds.TORCHVISION_PROBLEM, importlib.util.find_spec('torchvision'))"
    )
    ended = run(broken_torchvision, "-c", code)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.strip() == "RuntimeError: operator torchvision::nms does not exist None"
    assert "going on without it" in ended.stderr


def test_doctor_says_that_torchvision_is_broken(broken_torchvision: dict[str, str]) -> None:
    ended = run(broken_torchvision, "-m", "opd_ds.cli", "doctor", "--json")
    assert ended.returncode == 1
    report = json.loads(ended.stdout)
    (finding,) = [f for f in report["findings"] if f["what"] == "torchvision"]
    assert not report["ok"]
    assert "0.28.0, does not load (RuntimeError: operator torchvision::nms does not exist)" in finding["found"]
    assert "pip uninstall torchvision" in finding["problem"]


def test_doctor_names_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    (finding,) = [f for f in examine() if f.what == "C++ compiler"]
    assert finding.problem is not None
    assert "apt install g++" in finding.problem


def test_doctor_prints_a_line_per_finding() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert {line.split()[0] for line in result.output.splitlines()} >= {"opd-ds", "torch", "deepspeed", "accelerator"}
