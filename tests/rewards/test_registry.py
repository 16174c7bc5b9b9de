"""`opd-ds rewards list` and `check`, unknown names, third parties, and that looking costs nothing."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.errors import UserError
from opd_ds.rewards import RewardUnavailableError, build, check, reward_class, reward_names
from tests.rewards.servers import answering

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "transformers", "torchvision", "cv2", "onnxruntime", "rapidocr", "fastapi", "openai", "scipy"]
EXTRAS = {"ocr": "ocr", "unifiedreward": "vlm"}


def rewards(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["rewards", *arguments])
    return result.exit_code, result.output


def test_looking_imports_nothing_heavy() -> None:
    """One fresh process, one command after the other: which of `HEAVY` it has imported after each."""
    commands = (["recipes"], ["rewards", "list"], ["rewards", "check", "ocr", "unifiedreward"])
    program = (
        "import sys; from opd_ds.cli.main import app\n"
        f"for arguments in {commands!r}:\n"
        "    app(arguments, standalone_mode=False)\n"
        f"    print('imported', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    said = [set(line.split()) - {"imported"} for line in done.stderr.splitlines() if line.startswith("imported")]
    assert len(said) == len(commands)
    assert said[0] == set()
    assert said[-1] <= {"torch"}  # the rewards' own modules name its types


def test_list_has_a_row_for_every_reward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPD_DS_WEIGHTS", str(tmp_path))
    code, output = rewards("list", "--json")
    rows = {row["name"]: row for row in json.loads(output)}
    assert code == 0
    assert list(rows) == reward_names()
    assert all(row["judges"] for row in rows.values())
    assert rows["ocr"]["extra"] == "ocr"
    assert rows["ocr"]["installed"]
    assert rows["jpeg_compressibility"] == {
        "name": "jpeg_compressibility",
        "judges": "How little there is in an image: minus its JPEG size in kB (1000 bytes), quality 95",
        "extra": None,
        "installed": True,
        "weights": {},
    }
    code, output = rewards("list")
    assert code == 0
    assert all(name in output for name in ("ocr", "unifiedreward", "miniature_look"))


def test_check_is_one_line_each_and_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rewards("check", "jpeg_compressibility", "miniature_look") == (
        0,
        "jpeg_compressibility: ready\nminiature_look: ready\n",
    )
    code, output = rewards("check", "jpeg_compressibility", "unifiedrewards")
    assert code == 1
    assert "Did you mean 'unifiedreward'?" in output.splitlines()[1]
    monkeypatch.setattr("opd_ds.rewards.base.find_spec", lambda name: None)
    code, output = rewards("check", "ocr")
    assert (code, output) == (
        1,
        "ocr: reward 'ocr' needs rapidocr, onnxruntime, rapidfuzz: pip install 'opd-ds[ocr]'\n",
    )


def test_a_broken_torchvision_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_ds.cli.rewards.TORCHVISION_PROBLEM", "RuntimeError: operator torchvision::nms")
    for arguments in (["list"], ["check", "jpeg_compressibility"]):
        code, output = rewards(*arguments)
        assert code == 0
        assert "torchvision: installed but does not load" in output


@pytest.mark.parametrize("name", EXTRAS)
def test_a_reward_that_is_not_installed_says_the_pip_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_ds.rewards.base.find_spec", lambda _: None)
    with pytest.raises(RewardUnavailableError, match=rf"pip install 'opd-ds\[{EXTRAS[name]}\]'$"):
        check(name)


@pytest.mark.parametrize("name", EXTRAS)
def test_the_extra_installs_what_the_reward_needs(name: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needs = reward_class(name).needs
    assert needs.extra == EXTRAS[name]
    lines = setup["options.extras_require"][needs.extra].split()
    assert {line.split(">")[0] for line in lines} == set(needs.packages)


def test_unknown_names_and_options() -> None:
    with pytest.raises(UserError, match=r"tasks\.a\.reward = 'pickscor': unknown reward; .*Did you mean 'pickscore'\?"):
        check("pickscor", "tasks.a.reward")
    with pytest.raises(UserError, match=r"reward 'ocr': unknown option 'worker'.*Did you mean 'workers'\?"):
        build("ocr", worker=2)
    build("jpeg_compressibility", device="cuda")  # it has no network: a device is not its concern


def test_serve_without_the_extra_or_with_wrong_options(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--option 'timeout': expected key=value"):
        CliRunner().invoke(app, ["rewards", "serve", "remote", "--option", "timeout"], catch_exceptions=False)
    monkeypatch.setattr("opd_ds.rewards.base.find_spec", lambda _: None)
    with pytest.raises(RewardUnavailableError, match=r"pip install 'opd-ds\[serve\]'"):
        CliRunner().invoke(app, ["rewards", "serve", "jpeg_compressibility"], catch_exceptions=False)


def test_serve_hands_on_options(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("opd_ds.rewards.server.serve", lambda *arguments: started.extend(arguments))
    identity = b'{"name": "far", "identity": {}}'
    with answering(lambda *_: (200, identity)) as url:
        arguments = ["serve", "remote", "--port", "9000", "--option", f"url={url}", "--option", "batch_size=3"]
        code, output = rewards(*arguments)
    assert (code, output) == (0, "serving remote at http://127.0.0.1:9000\n")
    assert started[1:] == ["127.0.0.1", 9000]
    assert started[0]._batch_size == 3  # type: ignore[attr-defined]


THIRD_PARTY = '''
from typing import ClassVar
import torch
from opd_ds.rewards import Needs

class Bright:
    """Brightness of the image. Range [0, 255]."""
    name = "bright"
    needs: ClassVar[Needs] = Needs()
    def identity(self): return {"engine": "mean"}
    def score(self, images, prompts, metadata=None):
        return torch.tensor([float(image.convert("L").getpixel((0, 0))) for image in images])
'''


def test_third_parties_register_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.rewards.drawing import flat

    (tmp_path / "bright_reward.py").write_text(THIRD_PARTY)
    distribution = tmp_path / "bright-1.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: bright\nVersion: 1.0\n")
    points = ["bright = bright_reward:Bright", "ocr = bright_reward:Bright", "broken = not_there:Reward"]
    (distribution / "entry_points.txt").write_text("[opd_ds.rewards]\n" + "\n".join(points) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build("bright").score([flat("white")], ["a"]).tolist() == [255.0]
    assert reward_class("ocr").__module__ == "opd_ds.rewards.ocr"  # ours are not replaced in silence
    rows = {row["name"]: row for row in json.loads(rewards("list", "--json")[1])}
    assert rows["bright"]["judges"] == "Brightness of the image"
    assert rows["broken"]["judges"] == "does not import: ModuleNotFoundError: No module named 'not_there'"
