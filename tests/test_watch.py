"""Rewards beside the training: scores land with their round, however late, and a round never waits for them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_ds.config.algorithms import DistilConfig
from opd_ds.engine import Group
from opd_ds.evaluation.reward_pool import RewardPool
from opd_ds.rewards import Needs
from opd_ds.runs.reward_eval import AsyncRewardEval, RewardRecord
from opd_ds.runs.train import train
from opd_ds.training.trainer import RolloutResult
from tests.runs import metrics
from tests.tiny import run_settings


class Brightness:
    """Mean of all pixels; waits for `gate`, raises when `broken`, cannot judge the prompt `unknown`."""

    name = "brightness"
    needs: ClassVar[Needs] = Needs()

    def __init__(self) -> None:
        self.gate, self.broken = threading.Event(), False
        self.gate.set()

    def identity(self) -> dict[str, Any]:
        return {"engine": "mean of all pixels"}

    def score(self, images: list[Any], prompts: list[str], metadata: Any = None) -> torch.Tensor:
        self.gate.wait(60)
        if self.broken:
            raise RuntimeError("the server is gone")
        means = [sum(sum(p) / 3 for p in image.getdata()) / 255 / (image.width * image.height) for image in images]
        return torch.tensor([torch.nan if p == "unknown" else m for p, m in zip(prompts, means, strict=True)])


def grey(levels: list[float], prompts: list[str]) -> RolloutResult:
    """Latents that `decode` below turns into plain grey images."""
    final = [torch.full((4, 2, 2), level) for level in levels]
    return RolloutResult(prompts, [{} for _ in prompts], [() for _ in prompts], final)


def decode(latents: torch.Tensor) -> torch.Tensor:
    return latents[:, :3]


@pytest.fixture
def reward() -> Brightness:
    return Brightness()


@pytest.fixture
def watch(tiny_world: Path, tmp_path: Path, reward: Brightness) -> AsyncRewardEval:
    task = {"teacher": "x", "prompts": "y", "rewards": [{"name": "anything", "label": "light"}]}
    settings = run_settings(tiny_world, tmp_path, tasks={"one": task}, watch={"every": 1, "rollouts": 2})
    return AsyncRewardEval(DistilConfig.model_validate(settings), RewardPool({"light": reward}, decode))


def test_scores_come_later_with_the_round_they_belong_to(watch: AsyncRewardEval, reward: Brightness) -> None:
    reward.gate.clear()
    watch.submit(7, {"one": grey([0.2, 0.4, 1.0], ["a", "b", "c"])}, {})
    assert watch.finished() == []  # nothing waits for the reward
    reward.gate.set()
    (look,) = watch.close(lambda: None)
    # Two of three images, as watch.rollouts says; 8-bit images round.
    assert look == RewardRecord(7, "rollout", "one", "light", pytest.approx(0.3, abs=0.003), 2, 0)


def test_what_cannot_be_judged_is_counted_and_not_averaged(watch: AsyncRewardEval, reward: Brightness) -> None:
    watch.submit(1, {"one": grey([0.2, 0.6], ["unknown", "b"])}, {})
    (look,) = watch.close(lambda: None)
    assert (look.mean, look.judged, look.failed) == (pytest.approx(0.6, abs=0.003), 1, 1)


def test_a_reward_that_breaks_is_a_gap(
    watch: AsyncRewardEval, reward: Brightness, caplog: pytest.LogCaptureFixture
) -> None:
    reward.broken = True
    watch.submit(1, {"one": grey([0.2, 0.6], ["a", "b"])}, {})
    assert watch.close(lambda: None) == [RewardRecord(1, "rollout", "one", "light", None, 0, 2)]
    assert "the server is gone" in caplog.text


def test_a_slow_reward_drops_looks_instead_of_piling_up_pictures(
    watch: AsyncRewardEval, reward: Brightness, caplog: pytest.LogCaptureFixture
) -> None:
    reward.gate.clear()
    for done in range(1, 6):
        watch.submit(done, {"one": grey([0.5], ["a"])}, {})
    reward.gate.set()
    assert [look.round for look in watch.close(lambda: None)] == [1, 2]
    assert caplog.text.count("this evaluation is left out") == 3


def test_rollouts_are_decoded_between_rounds_and_a_failure_is_a_gap(
    tiny_world: Path, watch: AsyncRewardEval, reward: Brightness, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in the worker: beside the training there may be no room for it."""
    threads = []

    def decoding(latents: torch.Tensor) -> torch.Tensor:
        threads.append((threading.current_thread(), len(latents)))
        if len(threads) > 2:
            raise torch.OutOfMemoryError
        return decode(latents)

    watch._pool._decode = decoding
    for done in (1, 2):
        watch.submit(done, {"one": grey([0.2, 0.6], ["a", "b"])}, {})
    assert threads == [(threading.current_thread(), 1)] * 3
    assert [(look.round, look.judged) for look in watch.close(lambda: None)] == [(1, 2)]
    assert "round 2: the images of task one were not decoded" in caplog.text


def test_the_thread_of_rewards_has_the_ranks_device_and_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins on device 0, on the stream of the rounds; what it reads was written on theirs."""
    done: list[tuple[str, Any, bool]] = []

    def note(what: str, about: Any = None) -> None:
        done.append((what, about, threading.current_thread().name.startswith("rewards")))

    ready = SimpleNamespace(wait=lambda: note("wait"))

    def record() -> SimpleNamespace:
        note("record")
        return ready

    rounds = SimpleNamespace(record_event=record)
    device = torch.device("cuda", 3)
    monkeypatch.setattr(torch, "Stream", lambda device: f"stream of {device}")
    for name, stand_in in (
        ("set_device_index", lambda index: note("device", index)),
        ("set_stream", lambda stream: note("stream", stream)),
        ("current_stream", lambda of: {device: rounds}[of]),
    ):
        monkeypatch.setattr(torch.accelerator, name, stand_in)
    pool = RewardPool({}, decode, device)
    for _ in range(2):
        pool.submit(note, "work").result()
    own = [(what, about) for what, about, in_thread in done if in_thread]
    assert own == [("device", device), ("stream", "stream of cuda:3"), *[("wait", None), ("work", None)] * 2]
    assert [what for what, _, in_thread in done if not in_thread] == ["record", "record"]


@pytest.mark.parametrize("mode", ["buffered", "fused"])
def test_a_watched_run_trains_what_an_unwatched_one_trains(
    tiny_world: Path, tmp_path: Path, group: Group, mode: str
) -> None:
    prompts = str(tiny_world / "prompts.txt")
    task = {"teacher": str(tiny_world / "other"), "prompts": prompts, "eval_prompts": prompts}
    task["rewards"] = ["miniature_look", "jpeg_compressibility"]  # type: ignore[assignment]

    def run(name: str, **changes: Any) -> Path:
        settings = run_settings(tiny_world, tmp_path / name, tasks={"one": task}, rollout__mode=mode, **changes)
        train(DistilConfig.model_validate(settings), group)
        return tmp_path / name

    watched, plain = run("watched", watch={"every": 1, "held_out": 3, "rollouts": 2}), run("plain")
    assert metrics(watched) == metrics(plain)
    looks = [json.loads(line) for line in (watched / "rewards.jsonl").read_text().splitlines()]
    expected = {
        (done, source, "one", label, count)
        for done in (1, 2, 3)
        for source, count in (("held_out", 3), ("rollout", 2))
        for label in task["rewards"]
    }
    assert {(k["round"], k["source"], k["task"], k["label"], k["judged"]) for k in looks} == expected
    assert not (plain / "rewards.jsonl").exists()
    events = EventAccumulator(str(watched / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("watch/rollout/one/miniature_look")] == [1, 2, 3]
    assert any(tag.startswith("rewards") for tag in events.Tags()["tensors"])
