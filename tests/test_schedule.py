"""Which tasks a round trains, on how many samples of each, and in how many optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import parse_config
from opd_ds.config.schema import RunConfig
from opd_ds.config.turns import TaskSchedule, rounds_before, tasks_of_round
from opd_ds.data import rows_on_a_rank, shards_by
from opd_ds.engine import Group, Schedule
from opd_ds.errors import UserError
from opd_ds.runs.setup import Parts
from opd_ds.runs.train import train
from tests.ranks import TRAIN_MANY, launch
from tests.runs import assert_close, metrics
from tests.test_round import SGD
from tests.tiny import ALL_SHARDED, run_settings, write_config

Build = Callable[..., tuple[RunConfig, Parts]]
SCHEDULES: tuple[TaskSchedule, ...] = ("together", "alternate", "random")


# ---- which tasks ----


@settings(deadline=None)
@given(
    st.sampled_from(SCHEDULES),
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 3), min_size=1),
    st.integers(0, 3),
)
def test_prompts_are_walked_through_by_the_rounds_of_their_task(
    schedule: TaskSchedule, turns: dict[str, int], seed: int
) -> None:
    rounds = [tasks_of_round(schedule, turns, seed, index) for index in range(12)]
    for task in turns:
        for index in range(12):
            assert rounds_before(schedule, turns, seed, index, task) == sum(task in one for one in rounds[:index])


def test_tasks_are_drawn_by_their_turns_and_named_by_seed_and_round() -> None:
    turns = {"a": 3, "b": 1}
    drawn = [tasks_of_round("random", turns, 0, index)[0] for index in range(2000)]
    assert drawn.count("a") / 2000 == pytest.approx(0.75, abs=0.04)
    assert tasks_of_round("random", turns, 0, 1999) == drawn[1999:]
    assert drawn[:50] != [tasks_of_round("random", turns, 1, index)[0] for index in range(50)]


def weights_after(parts: Parts, rounds: int = 1) -> dict[str, Tensor]:
    for index in range(rounds):
        parts.trainer.run_round(index)
    return parts.student.gather_weights(trainable_only=True)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("mode", ["buffered", "fused"])
def test_a_round_of_one_task_is_that_of_a_run_of_it_alone(build_run: Build, mode: str) -> None:
    common: dict[str, Any] = {"deepspeed": "zero0", "rollout__mode": mode}
    config, parts = build_run(**common, train__schedule="alternate", tasks__two__turns=2, tasks__one__samples=6)
    alone = {"one": config.model_dump(mode="json")["tasks"]["one"] | {"samples": None}}
    _, single = build_run(**common, tasks=alone, rollout__samples=6)
    assert equal(weights_after(parts), weights_after(single))
    reports = [parts.trainer.run_round(index) for index in (1, 2, 3)]
    assert [list(report.losses.means) for report in reports] == [["two"], ["two"], ["one"]]
    assert [report.samples for report in reports] == [4, 4, 6]


# ---- several updates a round ----


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 7))
def test_every_update_has_a_part_of_the_samples_and_every_rank_equally_many(
    ranks: int, updates: int, each: int
) -> None:
    total = updates * each
    for update in range(updates):
        own = range(update * each, (update + 1) * each)
        (parts,) = shards_by(own, [None] * each, ranks, total).values()
        assert {len(part) for part in parts} == {rows_on_a_rank(total, ranks, updates) // updates}
        counted = [i for part in parts for i, w in zip(part.indices, part.weights, strict=True) if w > 0]
        assert counted == list(own)


def test_an_update_trains_on_its_own_samples(build_run: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is the update of a round of half the samples; both count as optimizer steps."""
    common = {"deepspeed": "zero0", "optimizer": SGD | {"lr": 0.1}, "rollout__micro_batch": 1, "train__micro_batch": 2}
    _, half = build_run(**common, rollout__samples=4)
    config, parts = build_run(
        **common, rollout__samples=8, train__updates_per_round=2, student__ema={"decay": 0.5, "every": 2}
    )
    seen: list[dict[str, Tensor]] = []
    step = parts.student.step

    def stepping() -> float:
        norm = step()
        seen.append(parts.student.gather_weights(trainable_only=True))
        return norm

    monkeypatch.setattr(parts.student, "step", stepping)
    parts.trainer.run_round(0)
    assert len(seen) == config.steps_per_round == 2
    assert equal(seen[0], weights_after(half))
    assert not equal(seen[0], seen[1])
    assert parts.ema is not None
    assert parts.ema.updated
    schedule = Schedule.of(config, {"optimizer": {"params": {"lr": 0.1}}})
    assert schedule is not None
    assert schedule.steps == 2 * config.run.rounds


# ---- the same on any ranks, and after a resume ----

TOGETHER: dict[str, Any] = {
    "rollout__samples": 6,  # three in an update, which two ranks cannot share evenly
    "rollout__trained_steps": {"queries": 2, "favour": "high_noise"},
    "train__updates_per_round": 2,
    "train__schedule": "random",
    "tasks__two__samples": 2,
    "tasks__two__turns": 2,
    "run__rounds": 5,
}


@pytest.mark.extended
@pytest.mark.multirank
def test_two_ranks_train_what_one_trains(tiny_world: Path, tmp_path: Path) -> None:
    cuts: dict[str, dict[str, Any]] = {
        "one": {"deepspeed": "zero0"},
        "two": {"deepspeed": "zero0", "train__micro_batch": 1},
        "sharded": {"deepspeed": ALL_SHARDED, "rollout__gather": "per_layer", "rollout__micro_batch": 2},
    }
    files = {
        name: str(write_config(tmp_path / f"{name}.yaml", run_settings(tiny_world, tmp_path / name, **TOGETHER | cut)))
        for name, cut in cuts.items()
    }
    launch(1, "--config", files["one"])
    launch(2, files["two"], files["sharded"], script=TRAIN_MANY)
    expected = metrics(tmp_path / "one")
    assert {key for row in expected for key in row if key.endswith("/kl")} == {"task/one/kl", "task/two/kl"}
    for name in ("two", "sharded"):
        assert_close(metrics(tmp_path / name), expected)


def test_a_resume_goes_on_with_the_next_task_and_takes_no_other_schedule(
    tiny_world: Path, tmp_path: Path, group: Group
) -> None:
    def run(name: str, resume: str = "never", **changes: Any) -> list[dict[str, float]]:
        wanted = run_settings(tiny_world, tmp_path / name, deepspeed="zero0", **TOGETHER | changes)
        train(DistilConfig.model_validate(wanted), group, resume)
        return metrics(tmp_path / name)

    whole = run("whole")
    run("cut", run__rounds=2)
    for key, value, said in (
        ("train__schedule", "alternate", "train.schedule was 'random' and is now 'alternate'"),
        ("train__updates_per_round", 1, "train.updates_per_round was 2 and is now 1"),
        ("tasks__two__turns", 1, "tasks.two.turns was 2 and is now 1"),
        ("tasks__two__samples", 4, "tasks.two.samples was 2 and is now 4"),
    ):
        with pytest.raises(UserError, match=said):
            run("cut", "auto", **{key: value})
    assert run("cut", "auto") == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__updates_per_round": 3}, "does not divide the 4 samples a round of task one; change it or rollout.s"),
        ({"train__updates_per_round": 2, "tasks__two__samples": 5}, "task two; change it or tasks.two.samples"),
        ({"train__updates_per_round": 2, "rollout__mode": "fused"}, "train.updates_per_round = 2 is not possible"),
    ],
)
def test_what_cannot_be_divided_is_named(
    tiny_world: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(run_settings(tiny_world, tmp_path, **changes))
