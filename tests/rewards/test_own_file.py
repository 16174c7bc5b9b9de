"""Rewards from a user's own file: the example of the docs, what runs record of it, what is said when it is wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.cluster.failures import message
from opd_ds.config.loading import load_config, parse_config
from opd_ds.engine import Group
from opd_ds.errors import IncompleteError, UserError
from opd_ds.rewards import build, check, rehearse
from opd_ds.rewards.needs import run_needs
from opd_ds.runs.evaluate import Choice, evaluate
from opd_ds.runs.train import train
from tests.rewards.drawing import flat
from tests.tiny import run_settings, write_config

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "my_rewards.py"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the example in the working folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(EXAMPLE, tmp_path / "my_rewards.py"))


def test_the_example_scores(own: Path) -> None:
    images = [flat("blue"), flat("red"), flat("black")]
    blueness = build("my_rewards.py:blueness", device="cuda", strength=2.0)
    scores = blueness.score(images, ["a", "b", "c"])
    assert scores.tolist() == [2.0, -2.0, 0.0]
    assert scores.dtype == torch.float32
    assert blueness.identity() == {
        "engine": "own file",
        "file": "my_rewards.py",
        "reward": "blueness",
        "sha256": hashlib.sha256(own.read_bytes()).hexdigest(),
        "options": {"strength": 2.0},
    }
    contrast = build(f"{own}:Contrast", device="cpu")
    assert contrast.score(images, ["a", "b", "c"]).tolist() == [0.0, 0.0, 0.0]
    assert contrast.identity() | {"range": "0 to 0.5"} == contrast.identity()


def test_arrays_tensors_and_none_are_scores_and_a_wrong_count_is_not(own: Path) -> None:
    own.write_text(
        "import numpy, torch\n"
        "def array(images, prompts, metadata): return numpy.arange(len(images))\n"
        "def double(images, prompts, metadata): return torch.ones(len(images), dtype=torch.float64).requires_grad_()\n"
        "def gaps(images, prompts, metadata): return [None if m.get('skip') else 1 for m in metadata]\n"
    )
    images = [flat("red")] * 2
    assert build("my_rewards.py:array").score(images, ["a", "b"]).tolist() == [0.0, 1.0]
    assert build("my_rewards.py:double").score(images, ["a", "b"]).dtype == torch.float32
    gaps = build("my_rewards.py:gaps").score(images, ["a", "b"], [{"skip": True}, {}])
    assert gaps.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("1.0", "float (1.0)"),
        ("None", "NoneType (None)"),
        ("['good', 'bad']", "list (['good', 'bad'])"),
        ("[1.0]", "1 numbers for 2 images"),
        ("numpy.ones((2, 3))", "ndarray (array([[1., 1., 1.], [1., 1., 1.]]))"),
        ("torch.ones(2, 3)", "a tensor of shape (2, 3) for 2 images"),
        ("torch.tensor(1.0)", "a tensor of shape () for 2 images"),
        ("[torch.ones(3)] * 2", "list ([tensor([1., 1., 1.]), tensor([1., 1., 1.])])"),
    ],
)
def test_what_is_no_score_is_refused_before_a_run(own: Path, returned: str, said: str) -> None:
    own.write_text(f"import numpy, torch\ndef f(images, prompts, metadata): return {returned}\n")
    message = f"my_rewards.py:f returned {said}; expected one number per image"
    with pytest.raises(UserError) as caught:
        rehearse("my_rewards.py:f", "tasks.one.rewards")
    assert str(caught.value) == message
    result = CliRunner().invoke(app, ["rewards", "check", "my_rewards.py:f"])
    assert (result.exit_code, result.output) == (1, f"my_rewards.py:f: {message}\n")


def test_code_that_needs_metadata_is_not_refused(own: Path) -> None:
    own.write_text(
        "def f(images, prompts, metadata):\n return [m['size'] for m in metadata]\n"
        "class Late:\n"
        " def __init__(self, size): self.size = size\n"
        " def score(self, images, prompts, metadata): return self.size\n"
    )
    rehearse("my_rewards.py:f")
    result = CliRunner().invoke(app, ["rewards", "check", "my_rewards.py:f", "my_rewards.py:Late"])
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "my_rewards.py:f: ready",
        "my_rewards.py:f: warning: raises for two blank images without metadata: KeyError: 'size' (line 2); "
        "right if it needs that metadata",
        "my_rewards.py:Late: ready",
    ]
    with pytest.raises(UserError, match=r"my_rewards.py:Late returned int"):
        build("my_rewards.py:Late", size=3)


def test_a_run_that_a_reward_has_not_scored_says_so_at_its_end(own: Path, tiny_world: Path, group: Group) -> None:
    own.write_text("def blueness(images, prompts, metadata): return [m['absent'] for m in metadata]")
    folder = own.parent / "out"
    with pytest.raises(IncompleteError, match="no image has a score by blueness"):
        train(parse_config(settings(tiny_world, folder, run__rounds=1)), group)
    assert json.loads((folder / "summary.json").read_text())["tasks"]["one"]["student"] is None
    assert (folder / "eval" / "report.html").is_file()
    assert message(IncompleteError("no image")) == "opd-ds: error: no image"
    for line in (folder / "scores.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["one/blueness"] is None


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        ("", "absent.py:f", r"No such file or directory in /.*; give FILE.py:NAME"),
        (
            "def blue(images, prompts, metadata): ...",
            "my_rewards.py:bleu",
            r"no 'bleu'; it has blue. Did you mean 'blue'",
        ),
        ("import torch", "my_rewards.py:f", "has no 'f'; it has no class and no function"),
        ("def f(:\n", "my_rewards.py:f", r"does not run: SyntaxError: .* \(line 1\)"),
        ("x = 1\nimport not_there", "my_rewards.py:f", r"ModuleNotFoundError: No module named 'not_there' \(line 2\)"),
        ("f = 3", "my_rewards.py:f", "f has the type int; a reward is a class with score, or a function"),
        ("class f: pass", "my_rewards.py:f", r"is a class without a method score\(self, images, prompts, metadata\)"),
        (
            "def f(images): ...",
            "my_rewards.py:f",
            r"has f\(images\); expected f\(images, prompts, metadata\): too many",
        ),
        (
            "class f:\n def score(self, images, prompts, metadata, more): ...",
            "my_rewards.py:f",
            r"expected score\(self, images, prompts, metadata\): missing a required argument: 'more'",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(own: Path, source: str, name: str, said: str) -> None:
    own.write_text(source)
    with pytest.raises(UserError, match=said) as caught:
        check(name, "tasks.one.rewards", {})
    message = str(caught.value)
    assert message.startswith(f"tasks.one.rewards = {name!r}: ")
    assert "\n" not in message


def test_options_and_constructors_that_do_not_fit(own: Path) -> None:
    with pytest.raises(UserError, match=r"unknown option 'strenght'; allowed: strength. Did you mean 'strength'"):
        check("my_rewards.py:blueness", options={"strenght": 2})
    own.write_text(
        "class Broken:\n def __init__(self):\n  open('/none')\n def score(self, images, prompts, metadata): ..."
    )
    said = r"my_rewards.py:Broken cannot be built: FileNotFoundError: .*'/none' \(line 3\)"
    with pytest.raises(UserError, match=said):
        build("my_rewards.py:Broken")


def test_a_changed_file_is_run_again_and_has_another_identity(own: Path) -> None:
    before = build("my_rewards.py:blueness").identity()["sha256"]
    own.write_text("def blueness(images, prompts, metadata): return [5 for _ in images]")
    after = build("my_rewards.py:blueness")
    assert after.identity()["sha256"] != before
    assert after.score([flat("red")], ["a"]).tolist() == [5.0]


def settings(world: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    prompts = str(world / "prompts.txt")
    named = {"prompts": prompts, "eval_prompts": prompts, "rewards": ["my_rewards.py:blueness"]}
    return run_settings(world, folder, tasks={"one": {"teacher": str(world / "other"), **named}}, **changes)


def test_a_distillation_and_an_evaluation_are_scored_by_it(own: Path, tiny_world: Path, group: Group) -> None:
    config = parse_config(settings(tiny_world, own.parent / "out", run__rounds=1))
    train(config, group)
    summary = json.loads((own.parent / "out" / "summary.json").read_text())
    assert -1 <= summary["tasks"]["one"]["student"] <= 1
    results = evaluate(config, Choice(rewards=["my_rewards.py:Contrast"], limit=1), group)
    assert results["rewards"]["Contrast"]["sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()
    assert results["scores"]["student"]["one"]["Contrast"]["n"] == 1
    whole = evaluate(config, Choice(rewards=[f"{own}:blueness"], limit=1), group)
    assert list(whole["rewards"]) == ["blueness"]


def test_a_teacher_is_made_with_two_of_them_and_their_sum_is_the_headline(
    own: Path, tiny_world: Path, group: Group
) -> None:
    data = settings(tiny_world, own.parent / "out", run__rounds=2, run__eval_every=1)
    del data["tasks"]["one"]["teacher"]
    data["tasks"]["one"]["rewards"] = [
        {"name": "my_rewards.py:blueness", "options": {"strength": 0.5}},
        {"name": "my_rewards.py:Contrast", "weight": 3.0},
    ]
    data["watch"] = {"every": 1}
    data |= {"teach": {"algorithm": "nft", "group": 2}}
    config = parse_config(data)
    assert config.tasks["one"].headline == "weighted_sum"
    train(config, group)
    folder = own.parent / "out"
    results = json.loads((folder / "eval" / "results.json").read_text())
    assert results["metrics"] == [["one", label] for label in ("weighted_sum", "blueness", "Contrast")]
    scores = results["scores"]["student"]["one"]
    parts = zip(scores["blueness"]["per_prompt"], scores["Contrast"]["per_prompt"], strict=True)
    assert scores["weighted_sum"]["per_prompt"] == pytest.approx([blue + 3 * contrast for blue, contrast in parts])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tasks"]["one"]["student"] == scores["weighted_sum"]["mean"]
    between = json.loads((folder / "scores.jsonl").read_text().splitlines()[0])
    assert between["one/weighted_sum"] == pytest.approx(between["one/blueness"] + 3 * between["one/Contrast"])
    watched = [json.loads(line)["label"] for line in (folder / "rewards.jsonl").read_text().splitlines()]
    assert set(watched) == {"weighted_sum", "blueness", "Contrast"}
    state = json.loads(next(folder.glob("checkpoints/round-*/state.json")).read_text())
    (first, _) = state["run"]["tasks"]["one"]["rewards"]
    assert first["identity"]["sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()


def test_a_config_names_it_from_its_own_folder(
    own: Path, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = settings(tiny_world, own.parent / "out")
    data["tasks"]["one"]["rewards"].append({"name": "my_rewards.py:Contrast", "label": "grey"})
    file = write_config(own.parent / "run.yaml", data)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    config = load_config(None, file, [])
    assert {label: reward.name for label, reward in config.rewards.items()} == {
        "blueness": f"{own}:blueness",
        "grey": f"{own}:Contrast",
    }
    shutil.move(own, elsewhere / "my_rewards.py")  # else from the working folder
    assert [one.absent for one in run_needs(load_config(None, file, []))] == [[], []]
    (elsewhere / "my_rewards.py").unlink()
    (problem,) = run_needs(load_config(None, file, []))[0].absent
    assert problem.endswith(f"No such file or directory in {own.parent} or in {elsewhere}; give FILE.py:NAME")


def test_a_runs_needs_name_file_and_problem(own: Path, tiny_world: Path) -> None:
    data = settings(tiny_world, own.parent / "out")
    data["probes"] = {"other": {"eval_prompts": str(tiny_world / "prompts.txt"), "rewards": ["my_rewards.py:absent"]}}
    blueness, absent = run_needs(parse_config(data))
    assert (blueness.asked_by, blueness.absent) == (["tasks.one"], [])
    assert blueness.sha256 == hashlib.sha256(own.read_bytes()).hexdigest()
    assert absent.asked_by == ["probes.other"]
    assert absent.absent[0].startswith("probes.other.rewards = 'my_rewards.py:absent': my_rewards.py has no 'absent'")


def test_the_command_checks_and_serves_it(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["rewards", "check", "my_rewards.py:blueness", "my_rewards.py:Contrast"])
    assert result.output == "my_rewards.py:blueness: ready\nmy_rewards.py:Contrast: ready\n"
    started: list[Any] = []
    monkeypatch.setattr("opd_ds.rewards.server.serve", lambda *arguments: started.extend(arguments))
    CliRunner().invoke(app, ["rewards", "serve", "my_rewards.py:blueness", "--option", "strength=2"])
    assert started[0].score([flat("blue")], ["a"]).tolist() == [2.0]
