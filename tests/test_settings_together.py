"""What is learned does not depend on how it is computed: settings of the one kind, with random ones of the other.

A setting by itself has its own tests. Faults that are left come from two of them that nobody has tried together.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from opd_ds.config.loading import parse_config
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.runs.setup import Parts, prepare
from tests.ranks import TRAIN_MANY, launch
from tests.runs import metrics
from tests.tiny import ALL_SHARDED, run_settings, with_changes, write_config

ROUNDS, CHOICES = 2, 2
SDE: dict[str, Any] = {"rollout__kernel": "flow", "rollout__noise_level": 0.5}
LORA: dict[str, Any] = {"student__kind": "lora"}
NFT = {"algorithm": "nft", "group": 2, "kl": 0.1}
GUARD = {"algorithm": "guard", "group": 2, "clip": 0.1, "kl": 0.1}
ON_SDE = SDE | {"rollout__trained_steps": {"fraction": 0.99}, "rollout__guidance": 1.0}
# By name: settings that change what is learned. BASE stands for the student's start.
LEARNED: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "LoRA": LORA,
    "SDE": SDE,
    "dpm2": {"rollout__kernel": "dpm2"},
    "policy gradient": SDE | {"objective": {"method": "ppo"}},
    "flow matching": {"objective": {"method": "sft"}},
    "beyond": {"objective": {"method": "closed_form", "extrapolation": 0.5}},
    "beyond, LoRA": LORA | {"objective": {"method": "closed_form", "extrapolation": 0.5}},
    "anchor": {"anchor": {"path": "BASE", "guidance": 2.0}},
    "anchor, LoRA": LORA | {"anchor": {"path": "BASE", "guidance": 2.0}},
    "apart": {"objective": {"method": "closed_form", "guided": "apart"}, "tasks__one__teacher__guidance": 2.0},
    "rewards too": SDE | {"reward_term": {"weight": 0.1, "group": 2}},
    "queries": {"rollout__trained_steps": {"queries": 2, "spread": True}},
    "noisy queries": SDE | {"rollout__trained_steps": {"queries": 1, "favour": "high_noise"}},
    "in turn": {"train__schedule": "alternate"},
    "drawn": {"train__schedule": "random", "tasks__two__turns": 2},
    "samples of its own": {"tasks__one__samples": 6},
    "updates": {"train__updates_per_round": 2},
    "average": {"student__ema": {"decay": 0.9, "every": 2}},
    "negative cached": {"rollout__negative_every": 2},
    "unguided": {"rollout__guidance": 1.0, "tasks__two__teacher__guidance": 1.0},
    "late": {"scoring__late": 1},
    "late queries, updates": {
        "scoring__late": 1,
        "rollout__trained_steps": {"queries": 2},
        "train__updates_per_round": 2,
    },
    "sizes": {"model__sizes": [[16, 16], [32, 16]]},
    "NFT": {"teach": NFT, "rollout__guidance": 1.0},
    "NFT, LoRA": LORA | {"teach": NFT | {"old_policy": {"rate": 0.3}}, "rollout__guidance": 1.0},
    "guard": ON_SDE | {"teach": GUARD},
    "guard, updates": ON_SDE | {"teach": GUARD, "train__updates_per_round": 2},
}
# By key: values that do not.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "deepspeed": ("zero0", "zero1", "zero2", ALL_SHARDED),
    "rollout__mode": ("buffered", "fused"),
    "rollout__gather": ("once", "per_layer"),
    "rollout__micro_batch": (1, 3, 8),
    "train__micro_batch": (1, 3, 8),
    "scoring__micro_batch": (None, 2, 5),
    "student__gradient_checkpointing": (False, True, "offload"),
    "model__text_encoders": ("resident", "offload"),
    "model__decode_micro_batch": (None, 1),
    "tasks__one__teacher__placement": ("auto", "resident", "offload", "stream", "zero_inference"),
    "tasks__two__teacher__placement": ("auto", "resident", "offload", "stream", "zero_inference"),
    "anchor__placement": ("auto", "resident", "offload", "stream", "zero_inference"),
    "base__placement": ("auto", "resident", "offload", "stream", "zero_inference"),
}


def settings(name: str, computed: dict[str, Any], world: Path, folder: Path) -> dict[str, Any]:
    """What is learned, by name, and how it is computed."""
    # Steps in proportion to the gradient: Adam's own are of one size, whatever rounding made of a gradient of zero.
    steps = {"lr": 1e-2, "eps": 1e-2}
    data = run_settings(world, folder, deepspeed="zero0", rollout__mode="buffered", run__rounds=ROUNDS, optimizer=steps)
    learned = {key: dict(value) if isinstance(value, dict) else value for key, value in LEARNED[name].items()}
    if "anchor" in learned:
        learned["anchor"]["path"] = str(world / "base")
    rewarded = [f"{Path(__file__).parent / 'brightness.py'}:brightness"]
    if "teach" in learned:
        data["tasks"] = {"one": {"prompts": str(world / "prompts.txt"), "rewards": rewarded}}
    elif "reward_term" in learned:
        learned |= {f"tasks__{task}__rewards": rewarded for task in data["tasks"]}
    return with_changes(with_changes(data, learned), computed)


def choose(name: str, number: int, world: Path) -> dict[str, Any]:
    """A random value for each of `COMPUTED`, one after the other, where the run knows the key and refuses no value."""
    drawn, chosen = random.Random(f"{name} {number}"), dict[str, Any]()
    for key in drawn.sample(list(COMPUTED), len(COMPUTED)):
        wanted = chosen | {key: drawn.choice(COMPUTED[key])}
        with suppress(UserError):
            parse_config(settings(name, wanted, world, world))
            chosen = wanted
    return chosen


def distance(parts: Parts, start: dict[str, Tensor]) -> float:
    """Of the student's trained weights from `start`."""
    weights = parts.student.gather_weights(trainable_only=True)
    return sum(float((weights[name] - start[name]).square().sum()) for name in start) ** 0.5


Learn = Callable[[str, dict[str, Any]], list[dict[str, float]]]


@pytest.fixture(scope="module")
def learn(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory, group: Group) -> Learn:
    """On one rank: losses and gradient norms of the rounds, and how far weights and average then are from the start.
    Each run is made once.
    """
    found: dict[str, list[dict[str, float]]] = {}

    def start(name: str, computed: dict[str, Any]) -> list[dict[str, float]]:
        said = f"{name} {computed}"
        if said not in found:
            config = parse_config(settings(name, computed, tiny_world, tmp_path_factory.mktemp("run")))
            parts = prepare(config, group)
            start = parts.student.gather_weights(trainable_only=True)
            reports = [parts.trainer.run_round(index) for index in range(ROUNDS)]
            rows = [{"loss": report.losses.loss, "grad_norm": report.grad_norm} for report in reports]
            rows.append({"change": distance(parts, start)})
            with parts.ema.swapped_in() if parts.ema else nullcontext():
                rows.append({"change of the average": distance(parts, start)})
            found[said] = rows
        return found[said]

    return start


@pytest.fixture(scope="module")
def on_two_ranks(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs, by name, each computed in a way of its own."""
    root = tmp_path_factory.mktemp("two")
    files = []
    for number, name in enumerate(LEARNED):
        data = settings(name, choose(name, CHOICES, tiny_world), tiny_world, root / name)
        files.append(str(write_config(root / f"{number}.yaml", data)))
    launch(2, *files, script=TRAIN_MANY, timeout=900)
    return root


def close(name: str, row: dict[str, float]) -> Any:
    """Rounding that turns a pixel over changes a reward by a thousandth of what rewards differ by."""
    rewarded = not {"teach", "reward_term"}.isdisjoint(LEARNED[name])
    return pytest.approx(row, rel=2e-2 if rewarded else 1e-4, abs=1e-6)


@pytest.mark.extended
@pytest.mark.parametrize("name", LEARNED)
def test_the_same_is_learned_however_it_is_computed(learn: Learn, tiny_world: Path, name: str) -> None:
    for number in range(CHOICES):
        computed = choose(name, number, tiny_world)
        assert len(computed) > 5, computed
        assert learn(name, computed) == [close(name, row) for row in learn(name, {})], computed


@pytest.mark.extended
@pytest.mark.multirank
@pytest.mark.parametrize("name", LEARNED)
def test_the_same_is_learned_on_two_ranks(learn: Learn, on_two_ranks: Path, name: str) -> None:
    rows = [{key: row[key] for key in ("loss", "grad_norm")} for row in metrics(on_two_ranks / name)]
    assert rows == [close(name, row) for row in learn(name, {})[:ROUNDS]]


@pytest.mark.extended
def test_every_way_to_compute_is_chosen(tiny_world: Path) -> None:
    """A key or value that no run takes any more would drop out unseen."""
    chosen = [choose(name, number, tiny_world) for name in LEARNED for number in range(CHOICES + 1)]
    for key, values in COMPUTED.items():
        if key != "anchor__placement":  # of the two with an anchor
            assert {one[key] for one in chosen if key in one} == set(values), key
