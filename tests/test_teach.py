"""Reinforcement learning from start to end on tiny worlds: it learns, resumes, shards, leaves out the unjudged."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.config.algorithms import TeachConfig
from opd_ds.config.loading import load_config, parse_config
from opd_ds.config.sections import WeightedReward
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.evaluation.reward_pool import RewardPool
from opd_ds.models import prompt_encoding
from opd_ds.models.libraries import load
from opd_ds.rewards import Needs
from opd_ds.runs.setup import Parts, prepare
from opd_ds.runs.train import train
from opd_ds.training.rl.reward_worker import Asked, RewardScorer
from tests.ranks import TRAIN_MANY, launch
from tests.runs import assert_close, metrics
from tests.tiny import ALL_SHARDED, run_settings, with_changes, write_config

NFT: dict[str, Any] = {"algorithm": "nft", "group": 4}
GUARD: dict[str, Any] = {"algorithm": "guard", "group": 4, "clip": 0.1}
SDE = {"kernel": "flow", "noise_level": 0.7}


class Redness:
    """Mean red minus mean blue; fails `failing` times, cannot judge the images of `unknown`."""

    name = "redness"
    needs: ClassVar[Needs] = Needs()

    def __init__(self, failing: int = 0, unknown: str = "") -> None:
        self.failing, self.unknown = failing, unknown
        self.calls: list[int] = []
        self.threads: set[str] = set()

    def identity(self) -> dict[str, Any]:
        return {"engine": "red minus blue"}

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> Tensor:
        self.calls.append(len(images))
        self.threads.add(threading.current_thread().name)
        if self.failing:
            self.failing -= 1
            raise ConnectionError("the server is gone")
        means = [image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for image in images]
        values = [(red - blue) / 255 for red, _, blue in means]  # type: ignore[misc]
        return torch.tensor([torch.nan if p == self.unknown else v for p, v in zip(prompts, values, strict=True)])


@pytest.fixture
def redness(monkeypatch: pytest.MonkeyPatch) -> Redness:
    """Stands for every reward of the runs that the test prepares."""
    reward = Redness()
    monkeypatch.setattr("opd_ds.runs.rewards.build", lambda name, **options: reward)
    return reward


def settings(world: Path, folder: Path, teach: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """As `run_settings`, with one task `bright` that is learned from a reward."""
    data = run_settings(world, folder)
    task = {"prompts": str(world / "prompts.txt"), "rewards": ["jpeg_compressibility"]}
    data |= {"tasks": {"bright": task}, "teach": dict(teach), "deepspeed": "zero0"}
    data["rollout"] = {"samples": 8, "steps": 4, "guidance": 1.0, "micro_batch": 4}
    if teach["algorithm"] == "guard":
        data["rollout"] |= SDE | {"trained_steps": {"fraction": 0.99}}
    return with_changes(data, changes)


Build = Callable[..., tuple[TeachConfig, Parts]]


@pytest.fixture
def build(tiny_world: Path, tmp_path: Path, group: Group) -> Build:
    def make(teach: dict[str, Any], **changes: Any) -> tuple[TeachConfig, Parts]:
        config = TeachConfig.model_validate(settings(tiny_world, tmp_path / "out", teach, **changes))
        return config, prepare(config, group)

    return make


# ---- it learns ----


@pytest.mark.parametrize(
    ("teach", "changes"),
    [
        (NFT, {"rollout__samples": 32, "teach__group": 8, "optimizer__lr": 3e-3}),
        (GUARD, {"rollout__samples": 32, "teach__group": 8, "optimizer__lr": 3e-3}),
        (GUARD, {"rollout__samples": 32, "teach__group": 8, "teach__window": 2, "rollout__trained_steps": None}),
    ],
    ids=["nft", "guard", "guard in a window"],
)
def test_a_policy_learns_its_reward(
    build: Build, redness: Redness, teach: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Mean reward of the rollouts, last rounds against the first, is up by far more than it varies."""
    changes = {"optimizer__lr": 3e-3, "rollout__micro_batch": 32, "train__micro_batch": 96} | changes
    if changes.get("rollout__trained_steps", 0) is None:
        changes["rollout__trained_steps"] = {"fraction": 1.0}
    _, parts = build(teach, **changes)
    scores = [parts.trainer.run_round(index).scores for index in range(14)]
    first = sum(row["bright/mean"] for row in scores[:2]) / 2
    last = sum(row["bright/mean"] for row in scores[-2:]) / 2
    spread = scores[0]["bright/std"] / 32**0.5
    assert last - first > 4 * spread, (first, last, spread)
    assert all(thread.startswith("rewards") for thread in redness.threads)


def test_the_first_round_of_nft_starts_at_its_old_policy(build: Build, redness: Redness) -> None:
    """v = v_old = v_start there: the loss does not depend on beta (5 (r l + (1-r) l) / beta), nor on the KL."""
    losses = []
    for beta, kl in ((1.0, 0.0), (0.5, 0.0), (1.0, 10.0)):
        _, parts = build(NFT | {"beta": beta, "kl": kl})
        report = parts.trainer.run_round(0)
        assert report.losses.means["bright"]["start_distance"] == 0.0
        losses.append(report.losses.loss * beta)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == losses[2]


def test_the_first_step_of_guard_has_ratio_one(build: Build, redness: Redness) -> None:
    """On-policy every log-ratio is exactly 0; the second pass over the same rollouts is off-policy."""
    _, parts = build(GUARD, train__micro_batch=4)  # as in the rollout: the same numbers bit for bit
    assert parts.trainer.run_round(0).losses.means["bright"]["ratio"] == 1.0
    _, parts = build(GUARD, train__micro_batch=4, train__inner_epochs=2)
    assert parts.trainer.run_round(0).losses.means["bright"]["ratio"] != 1.0


def test_networks_are_read_before_the_rounds_and_in_the_main_thread(
    build: Build, redness: Redness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While diffusers reads one, torch's default dtype is another for all threads: rounds beside it fail, or differ."""
    read: list[tuple[str, bool]] = []

    def reading(kind: Any, path: Path, what: str, **settings: Any) -> Any:
        read.append((what, threading.current_thread() is threading.main_thread()))
        return load(kind, path, what, **settings)

    monkeypatch.setattr(prompt_encoding, "load", reading)
    _, parts = build(NFT, precision="bf16", rollout__micro_batch=1)
    assert ("vae", True) in read
    parts.trainer.run_round(0)
    assert len(read) == 2
    assert all(in_main for _, in_main in read)


def test_a_window_moves_and_only_it_is_trained(build: Build, redness: Redness) -> None:
    _, parts = build(GUARD | {"window": 2}, rollout__trained_steps={"fraction": 1.0})
    seen = set()
    for index in range(6):
        row = parts.trainer.run_round(index).losses.by_step["bright"]["ratio"]
        trained = torch.isfinite(row).nonzero().flatten().tolist()
        assert len(trained) == 2
        assert trained[1] == trained[0] + 1
        seen.add(trained[0])
    assert len(seen) > 1


def test_passes_are_counted(build: Build, redness: Redness) -> None:
    """8 samples: 4 steps of rollout, 3 trained steps each scored by old policy and start, and trained."""
    _, parts = build(NFT, rollout__trained_steps={"queries": 3})
    assert parts.trainer.run_round(0).passes == {"forward": 8 * (4 + 3 + 3 + 3), "backward": 8 * 3}
    _, parts = build(NFT | {"kl": 0.0}, rollout__trained_steps={"queries": 3}, rollout__guidance=2.0)
    assert parts.trainer.run_round(0).passes == {"forward": 2 * 8 * (4 + 3 + 3), "backward": 2 * 8 * 3}


# ---- the same however it is cut ----


def test_stages_kinds_and_micro_batches_learn_the_same(build: Build, redness: Redness) -> None:
    """Two rounds, of which the second has an old policy that has followed; metrics agree to rounding."""

    def rows(**changes: Any) -> list[dict[str, float]]:
        # A plain step: Adam would blow up the rounding of gradients that are nearly 0.
        _, parts = build(NFT | {"old_policy": {"rate": 0.3}, "kl": 0.1}, optimizer={"lr": 1e-2, "eps": 1e-2}, **changes)
        found = []
        for index in range(2):
            report = parts.trainer.run_round(index)
            found.append({"round": index, "loss": report.losses.loss, "grad_norm": report.grad_norm} | report.scores)
        return found

    for kind, stages in (("full", ("zero1", ALL_SHARDED)), ("lora", ("zero2", ALL_SHARDED))):
        expected = rows(student__kind=kind)
        for stage in stages:
            assert_close(rows(student__kind=kind, deepspeed=stage), expected)
        assert_close(rows(student__kind=kind, rollout__micro_batch=3, train__micro_batch=5), expected)


@pytest.mark.extended
@pytest.mark.multirank
def test_two_ranks_learn_what_one_learns_and_go_on_from_its_checkpoint(
    tiny_world: Path, tmp_path: Path, group: Group
) -> None:
    """Groups of 4 over ranks that hold 6 samples each; the old policy and the start are in the checkpoint."""
    changes = {
        "rollout__samples": 12,
        "run__rounds": 4,
        "run__checkpoint_every": 1,
        "run__keep_checkpoints": 9,
        "optimizer": {"lr": 1e-2, "eps": 1e-2},
        "deepspeed": ALL_SHARDED,
    }
    resumed = []
    for name, teach in (("nft", NFT | {"old_policy": {"rate": 0.3}, "kl": 0.1}), ("guard", GUARD | {"kl": 0.1})):
        train(parse_config(settings(tiny_world, tmp_path / f"{name}-one", teach, **changes)), group)
        data = settings(tiny_world, tmp_path / f"{name}-two", teach, **changes)
        place = tmp_path / f"{name}-two" / "checkpoints" / "round-000002"
        place.parent.mkdir(parents=True)
        shutil.copytree(tmp_path / f"{name}-one" / "checkpoints" / place.name, place)
        resumed.append(f"{write_config(tmp_path / f'{name}.yaml', data)}:auto")
    launch(2, *resumed, script=TRAIN_MANY)
    for name in ("nft", "guard"):
        one, two = metrics(tmp_path / f"{name}-one"), metrics(tmp_path / f"{name}-two")
        assert [row["round"] for row in two] == [3, 4]
        for mine, other in zip(two, one[2:], strict=True):
            # On-policy the guard's policy loss is 0 but for rounding.
            assert mine == pytest.approx(other, rel=1e-3, abs=1e-6)


def test_a_resumed_run_repeats_the_uninterrupted_one(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    changes = {"run__rounds": 4, "run__checkpoint_every": 1, "run__keep_checkpoints": 9}
    teach = NFT | {"old_policy": {"rate": 0.3}, "kl": 0.1}
    config = parse_config(settings(tiny_world, tmp_path / "out", teach, **changes))
    train(config, group)
    whole = metrics(tmp_path / "out")
    train(config, group, str(tmp_path / "out" / "checkpoints" / "round-000002"))
    assert metrics(tmp_path / "out") == whole


# ---- rewards ----


def judge_of(reward: Redness, attempts: int = 3) -> RewardScorer:
    return RewardScorer(RewardPool({"r": reward}, lambda latents: latents[:, :3]), attempts, pause=0.0)  # type: ignore[dict-item]


def scores_of(judge: RewardScorer, prompts: list[str]) -> list[float]:
    latents = torch.rand(len(prompts), 4, 2, 2)
    rewards = [WeightedReward.model_validate({"name": "redness", "label": "r"})]
    pending = [judge.submit(rewards, latents, Asked(prompts, [{} for _ in prompts], [() for _ in prompts]))]
    return RewardScorer.collect(pending, lambda: None)[:, 0].tolist()


def test_a_failed_reward_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    reward = Redness(failing=2)
    assert all(value == value for value in scores_of(judge_of(reward), ["a", "b"]))
    assert reward.calls == [2, 2, 2]
    assert "attempt 2 of 3" in caplog.text


def test_what_is_never_judged_has_no_score_and_only_it_is_asked_again() -> None:
    reward = Redness(unknown="b")
    values = scores_of(judge_of(reward), ["a", "b", "c"])
    assert [value == value for value in values] == [True, False, True]
    assert reward.calls == [3, 1, 1]


def test_pictures_without_a_score_are_left_out_and_counted(build: Build, redness: Redness) -> None:
    """As if they had not been drawn: the others' mean is over them alone."""
    redness.unknown = "a red 3 on blue"
    _, parts = build(NFT, teach__reward_attempts=1, rollout__samples=20)  # 5 prompts, each once
    report = parts.trainer.run_round(0)
    assert report.scores["bright/left_out"] == 4
    assert report.losses.loss == pytest.approx(report.losses.means["bright"]["policy"])
    assert torch.isfinite(torch.tensor(report.losses.loss))
    assert report.grad_norm > 0


def test_a_round_that_nobody_judges_ends_the_run_with_one_line(build: Build, redness: Redness) -> None:
    redness.failing = 100
    _, parts = build(NFT, teach__reward_attempts=1)
    with pytest.raises(UserError, match="scored none of its 8 images in 1 attempts"):
        parts.trainer.run_round(0)


def test_weights_add_rewards_up(build: Build, redness: Redness) -> None:
    twice = [
        {"name": "jpeg_compressibility", "label": "a", "weight": 2.0},
        {"name": "jpeg_compressibility", "label": "b", "weight": -0.5},
    ]
    _, parts = build(NFT, tasks__bright__rewards=twice)
    scores = parts.trainer.run_round(0).scores
    assert scores["bright/a"] == scores["bright/b"]
    assert scores["bright/mean"] == pytest.approx(1.5 * scores["bright/a"])


# ---- joint and cascade ----


def two_tasks(world: Path, **first: Any) -> dict[str, Any]:
    task = {"prompts": str(world / "prompts.txt"), "rewards": ["jpeg_compressibility"]}
    return {"bright": task | first, "dark": task | {"rewards": [{"name": "jpeg_compressibility", "weight": -1.0}]}}


def test_joint_learning_alternates_or_does_all_at_once(build: Build, redness: Redness, tiny_world: Path) -> None:
    tasks = two_tasks(tiny_world, turns=2)
    _, parts = build(NFT, train__schedule="alternate", tasks=tasks)
    order = [list(parts.trainer.run_round(index).rolled) for index in range(4)]
    assert order == [["bright"], ["bright"], ["dark"], ["bright"]]
    _, parts = build(NFT, tasks=tasks)
    report = parts.trainer.run_round(0)
    assert list(report.rolled) == ["bright", "dark"]
    assert report.samples == 16


@pytest.mark.parametrize("teach", [NFT | {"old_policy": {"rate": 0.1, "start": 1}}, GUARD], ids=["nft", "guard"])
def test_several_updates_a_round_train_on_whole_groups(
    build: Build, redness: Redness, teach: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the micro-batches; the old policy follows by optimizer steps."""
    followed: list[float] = []
    monkeypatch.setattr("opd_ds.engine.WeightSnapshot.follow", lambda self, decay: followed.append(decay))
    changes: dict[str, Any] = {"train__updates_per_round": 2, "train__inner_epochs": 2, "student__ema": {"decay": 0.0}}
    found = []
    for size in (3, 64):
        _, parts = build(teach, train__micro_batch=size, optimizer={"lr": 1e-2, "eps": 1e-2}, **changes)
        reports = [parts.trainer.run_round(index) for index in range(2)]
        found.append([(report.losses.loss, report.grad_norm) for report in reports])
        assert reports[0].passes["backward"] == 2 * 8 * (4 if teach["algorithm"] == "nft" else 3)
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-3, atol=1e-6)
    assert followed[:2] == ([pytest.approx(0.3), 0.5] if teach["algorithm"] == "nft" else [])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_cascade_starts_from_the_last_result(tiny_world: Path, tmp_path: Path, group: Group, kind: str) -> None:
    """What the first run exported is where the second one starts: drawn images are the same."""
    probe = {"eval_prompts": str(tiny_world / "prompts.txt"), "rewards": ["jpeg_compressibility"]}
    changes = {"student__kind": kind, "probes": {"held": probe}, "run__rounds": 1, "evaluation__baselines": True}
    first = settings(tiny_world, tmp_path / "first", NFT, **changes)
    train(parse_config(first), group)
    second = settings(
        tiny_world, tmp_path / "second", NFT, **changes, student__start=str(tmp_path / "first" / "export")
    )
    train(parse_config(second), group)
    before, after = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("first", "second"))
    assert after["models"]["start"]["held"] == pytest.approx(before["models"]["student"]["held"], rel=1e-6)
    assert before["models"]["base"]["held"] != before["models"]["student"]["held"]
    assert "base" not in after["models"]  # nobody has drawn it
    assert json.loads((tmp_path / "first" / "scores.jsonl").read_text().splitlines()[-1])["round"] == 1


# ---- configs ----


def test_recipes_of_both_kinds_are_complete() -> None:
    for name in ("miniature_nft_text", "miniature_guard_look"):
        config = load_config(name, None, [])
        assert isinstance(config, TeachConfig)
        assert len(config.evaluated) == 4  # the tasks, and all three at once
        result = CliRunner().invoke(app, ["teach", "--recipe", name, "--dry-run"], catch_exceptions=False)
        assert "12 per task, 8 images of each" in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout__samples": 6}, "rollout.samples = 6 is no multiple of teach.group = 4"),
        ({"train__updates_per_round": 4}, "updates_per_round = 4 does not divide the 2 prompts a round of task bright"),
        ({"rollout__mode": "fused"}, "rewards come after a rollout"),
        ({"teach__beta": -1}, "teach.beta = -1: allowed: more than 0"),
        ({"teach__betta": 1}, "teach.betta = 1: unknown key; allowed here: group, .*algorithm, .*Did you mean 'beta'"),
        ({"teach__algorithm": "ppo"}, "teach.algorithm = 'ppo': allowed are nft, guard"),
        ({"tasks__bright__rewards": []}, "tasks.bright.rewards"),
        ({"tasks__bright__teacher": "x"}, "tasks.bright.teacher = 'x': unknown key"),
        ({"probes__bright": {"eval_prompts": "x"}}, "probes: 'bright' is a task as well"),
    ],
)
def test_contradictions_are_named(tiny_world: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(settings(tiny_world, tmp_path, NFT, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout__noise_level": 0.0, "rollout__kernel": "euler"}, "rollout.noise_level = 0 draws none"),
        ({"teach__window": 2}, "teach.window says which steps are trained"),
        ({"teach__window": 9, "rollout__trained_steps": {"fraction": 1.0}}, "a trajectory has only 4 steps"),
    ],
)
def test_guards_contradictions_are_named(
    tiny_world: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(settings(tiny_world, tmp_path, GUARD, **change))


def test_guard_refuses_steps_that_draw_nothing(build: Build, redness: Redness) -> None:
    with pytest.raises(UserError, match="'cps' draws no noise on step 3"):
        build(GUARD, rollout__kernel="cps", rollout__trained_steps={"steps": [0, 3]})
    with pytest.raises(UserError, match="draws noise on 3 of its 4 steps, fewer than are to be trained"):
        build(GUARD, rollout__kernel="cps", rollout__trained_steps={"fraction": 1.0})
    _, parts = build(GUARD | {"window": 2}, rollout__kernel="cps", rollout__trained_steps={"fraction": 1.0})
    for index in range(5):  # windows lie where noise is drawn
        assert torch.isnan(parts.trainer.run_round(index).losses.by_step["bright"]["ratio"][3])


def test_a_config_may_extend_another(tmp_path: Path, tiny_world: Path) -> None:
    write_config(tmp_path / "base.yaml", settings(tiny_world, tmp_path / "out", NFT))
    (tmp_path / "mine.yaml").write_text("extends: base\noptimizer: {lr: 0.5}\nteach: {beta: 0.1}\n")
    config = load_config(None, tmp_path / "mine.yaml", [])
    assert isinstance(config, TeachConfig)
    assert (config.optimizer.lr, config.teach.group, getattr(config.teach, "beta", None)) == (0.5, 4, 0.1)
    (tmp_path / "base.yaml").write_text("extends: mine\n")
    with pytest.raises(UserError, match="extends itself"):
        load_config(None, tmp_path / "mine.yaml", [])


def test_teach_wants_a_config_that_teaches(tiny_world: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "distil.yaml", run_settings(tiny_world, tmp_path / "out"))
    result = CliRunner().invoke(app, ["teach", "--config", str(file)])
    assert isinstance(result.exception, UserError)
    assert "has no section `teach`" in str(result.exception)
