"""Passes of the network: counted by part, saved by kept directions and by the choice of the mode, told at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import parse_config
from opd_ds.config.schema import RunConfig
from opd_ds.diffusion.rollout import Rows
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.models import guide
from opd_ds.plan import timing
from opd_ds.plan.devices import GIB, Devices, parse_devices
from opd_ds.plan.rollout_mode import choose_mode
from opd_ds.runs import rollout_mode
from opd_ds.runs.monitor import METRICS_FILE, read_metrics
from opd_ds.runs.pass_summary import as_lines, pass_summary
from opd_ds.runs.resume import ResumePoint
from opd_ds.runs.setup import Parts
from opd_ds.runs.train import train
from opd_ds.training.kept_directions import KeptDirections
from tests.test_round import own_teacher
from tests.tiny import costs_of, run_settings

Build = Callable[..., tuple[RunConfig, Parts]]


# ---- by part ----


def test_passes_are_counted_by_part_and_by_what_guidance_costs(build_run: Build) -> None:
    """4 samples of each task, 4 trained steps, 3 rolled; guidance 2 of the student, 1 and 3 of the teachers."""
    for mode, rolled in (("buffered", 3), ("fused", 0)):
        report = build_run(rollout__mode=mode)[1].trainer.run_round(0)
        drawn, scored, trained = 2 * 4 * rolled, 4 * 4 * (1 + 2), 2 * 4 * 4
        assert report.passes_by_part == {
            "rollout": 2 * drawn, "rollout_negative": drawn,
            "score": scored, "score_negative": 4 * 4,
            "train": 2 * trained, "train_negative": trained,
        }  # fmt: skip
        assert report.passes == {"forward": 2 * drawn + scored + 2 * trained, "backward": 2 * trained}


def test_a_run_says_what_its_learning_cost(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    prompts, rewards = str(tiny_world / "prompts.txt"), ["jpeg_compressibility"]
    evaluated = {"eval_prompts": {"path": prompts, "limit": 1}, "rewards": rewards, **own_teacher(tiny_world)}
    changes = {"tasks": {"t": evaluated}, "evaluation__baselines": True, "run__rounds": 2, "deepspeed": "zero0"}
    train(parse_config(run_settings(tiny_world, tmp_path / "out", **changes)), group)
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["passes"]
    rows = read_metrics(tmp_path / "out" / METRICS_FILE)
    assert found["forward"] == sum(row["passes/forward"] for row in rows) == 2 * 4 * 2 * (3 + 4 + 4)
    assert found["by_part"]["train"] == sum(row["passes/train"] for row in rows) == found["backward"] == 2 * 4 * 2 * 4
    assert found["trajectories"] == 8
    assert found["per_trajectory"] == 2 * (3 + 4 + 3 * 4)
    assert found["per_trained_state"] == found["per_trajectory"] / 4


def test_the_cost_of_reward_is_by_hundredth_of_the_mean_gain(configured: Callable[..., DistilConfig]) -> None:
    config = configured(run__rounds=2)
    rows = [{"round": number, "passes/forward": 600, "passes/backward": 200} for number in (1, 2)]
    scores: dict[str, dict[str, float | None]] = {
        "one": {"base": 0.2, "student": 0.6},
        "two": {"base": 0.5, "student": 0.7},
    }
    found = pass_summary(config, rows, scores)
    assert found is not None
    assert found["per_point"] == pytest.approx(2000 / 30)
    assert any("67 for each 0.01" in line for line in as_lines(found))
    for unknown in ({"one": {"base": None, "student": 0.6}}, {"one": {"base": 0.9, "student": 0.1}}):
        found = pass_summary(config, rows, scores | unknown)
        assert found is not None
        assert found["per_point"] is None
    assert pass_summary(config, rows[1:], scores) is None, "records of an older program, or lost ones"


# ---- directions that are kept ----


def test_a_kept_direction_takes_the_place_of_the_negative_prompt(build_run: Build) -> None:
    """Exactly, where it is the state's own; with it, one pass."""
    _, parts = build_run(deepspeed="zero0")
    family, asked = parts.family, []
    conds = family.encode(["a", "b"])
    x, sigma = torch.randn(2, *family.latent_shape), torch.full((2,), 0.7)

    def network(*args: Any, **kwargs: Any) -> Any:
        asked.append(len(kwargs["hidden_states"]))
        return parts.student(*args, **kwargs)

    with torch.no_grad():
        whole = guide(family, network, x, sigma, conds, family.encode([""]), 3.0)
        assert whole.cond is not None
        assert whole.uncond is not None
        direction = whole.cond - whole.uncond
        again = guide(family, network, x, sigma, conds, family.encode([""]), 3.0, direction=direction)
    torch.testing.assert_close(again.velocity, whole.velocity)
    assert asked == [4, 2]


def test_directions_are_asked_for_at_every_nth_step_and_kept_by_sample() -> None:
    kept, cpu = KeptDirections(2, 5), torch.device("cpu")

    def predicted(rows: list[int], step: int) -> Any:
        values = torch.tensor(rows).float()[:, None] + 10 * step
        return SimpleNamespace(cond=values + 1, uncond=torch.ones(len(rows), 1))

    for part in ([0, 2, 4], [1, 3]):  # micro-batches, of which samples leave
        for step in range(5):
            rows = Rows.of(part[: 2 if step < 3 else 1], cpu)
            found = kept.at(step, rows)
            assert (found is None) == (step % 2 == 0)
            if found is None:
                kept.put(rows, predicted(rows.host, step))
            else:
                assert found.flatten().tolist() == [row + 10 * (step - 1) for row in rows.host]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rollout_with_kept_directions_is_that_of_a_plain_loop(
    build_run: Build, tiny_world: Path, monkeypatch: pytest.MonkeyPatch, sgd: Callable[[int], str], stage: int
) -> None:
    monkeypatch.setattr(RunConfig, "shows_rollouts", lambda self, index: True)
    tasks = {"t": own_teacher(tiny_world)}
    exact = build_run(deepspeed=sgd(stage), tasks=tasks)[1].trainer.run_round(0)
    report = build_run(deepspeed=sgd(stage), tasks=tasks, rollout__negative_every=3)[1].trainer.run_round(0)
    assert report.passes_by_part["rollout"] == 4 * (4 + 2)  # steps 0 and 3
    assert report.passes_by_part["train"] == exact.passes_by_part["train"]
    _, parts = build_run(deepspeed="zero0", tasks=tasks)
    family, batches = parts.family, parts.trainer._draw(0)
    (batch,) = batches.values()
    sigmas = family.sigmas(4).tolist()
    x, direction = batch.noise.draw(slice(None)), Tensor()
    with torch.no_grad():
        for step in range(4):
            sigma = torch.full((4,), sigmas[step])
            v_cond = family.velocity(parts.student, x, sigma, batch.cond)
            if step in (0, 3):
                direction = v_cond - family.velocity(parts.student, x, sigma, family.encode([""]).expand(4))
            x = x + (sigmas[step + 1] - sigmas[step]) * (v_cond + (2.0 - 1) * direction).float()
    torch.testing.assert_close(torch.stack(report.rolled["t"].final), x, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(torch.stack(exact.rolled["t"].final), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__mode": "fused"}, "rollout.negative_every = 2 is not possible; set rollout.negative_every to 1"),
        ({"objective__method": "sft"}, r"objective.method = 'sft' .* set it to 1"),
    ],
)
def test_directions_are_not_kept_where_what_was_drawn_counts(
    tiny_world: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(run_settings(tiny_world, tmp_path, rollout__negative_every=2, **changes))


# ---- the mode of rollouts ----


GPU = parse_devices("1xH100-80GB", "--gpus")


@pytest.mark.parametrize(
    ("changes", "devices", "mode", "reason"),
    [
        ({}, GPU, "fused", "pass units a round instead of"),
        ({}, parse_devices("2xcpu", "--gpus"), "buffered", "on CPUs"),
        ({}, Devices.like("NVIDIA H100 80GB HBM3", 1, 0.5 * GIB), "buffered", "fused needs"),
        ({"train__inner_epochs": 2}, GPU, "buffered", "train.inner_epochs = 2"),
        ({"tasks__two__teacher__placement": "offload"}, GPU, "buffered", "'offload' is brought in once a round"),
        ({"rollout__trained_steps": {"queries": 1}}, GPU, "buffered", "with random steps it trains all"),
        ({"rollout__mode": "fused"}, parse_devices("2xcpu", "--gpus"), "fused", "as rollout.mode says"),
    ],
)
def test_auto_is_fused_where_that_is_possible_fits_and_saves_passes(
    configured: Callable[..., DistilConfig],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    devices: Devices,
    mode: str,
    reason: str,
) -> None:
    monkeypatch.setattr(timing, "OPERATION", 0.0)  # of a network as small as this nothing else would count
    config = configured(**changes)
    found, why = choose_mode(config, costs_of(config), devices)
    assert found == mode
    assert reason in why


def test_auto_is_buffered_where_many_small_forwards_are_slower(configured: Callable[..., DistilConfig]) -> None:
    config = configured(rollout__micro_batch=1)
    mode, reason = choose_mode(config, costs_of(config), GPU)
    assert (mode, reason.partition(" s a round")[0][:15]) == ("buffered", "planned to take")


def test_devices_are_known_by_the_drivers_names() -> None:
    assert Devices.like("NVIDIA GeForce RTX 4090", 2, 1.0).kind.name == "RTX4090-24GB"
    assert Devices.like("NVIDIA A100-SXM4-40GB", 1, 7.0).kind.memory == 7.0
    assert Devices.like("some accelerator", 1, 1.0).kind.flops == GPU.kind.flops


class Gpus:
    """A process group on GPUs, as far as the choice asks it."""

    device = torch.device("cuda")
    world = SimpleNamespace(size=1, is_main=True)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


def test_a_run_on_gpus_decides_once_and_keeps_its_mode(
    build_run: Build, configured: Callable[..., DistilConfig], monkeypatch: pytest.MonkeyPatch, tiny_world: Path
) -> None:
    free = [70 * GIB]
    monkeypatch.setattr(timing, "OPERATION", 0.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    config, group = configured(), Gpus()
    teachers = {name: SimpleNamespace(settings=one, path=Path(one.path)) for name, one in config.teachers.items()}
    files = SimpleNamespace(model=tiny_world / "base", teachers=teachers)

    def decided(config: RunConfig, state: dict[str, Any] | None = None) -> str:
        resumed = None if state is None else ResumePoint(tiny_world, state)
        return rollout_mode.with_decided_mode(config, files, group, resumed).rollout.mode  # type: ignore[arg-type]

    assert decided(config) == "fused"
    assert decided(config, {rollout_mode.ENTRY: "buffered"}) == "buffered"
    free[0] = GIB // 2
    assert decided(config) == "buffered"
    assert decided(config, {rollout_mode.ENTRY: "fused"}) == "fused"
    assert decided(configured(train__inner_epochs=2), {rollout_mode.ENTRY: "fused"}) == "buffered"
    assert build_run()[1].config.rollout.mode == "buffered"  # on CPUs
