"""A checkpoint goes on anywhere: other numbers of ranks, other ZeRO stages, offload, LoRA and full."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from opd_ds.config.algorithms import DistilConfig
from opd_ds.engine import Group, consolidated_weights
from opd_ds.runs.train import train
from tests.ranks import TRAIN_MANY, launch
from tests.runs import assert_close, metrics
from tests.tiny import ALL_SHARDED, run_settings, write_config

pytestmark = [pytest.mark.multirank, pytest.mark.extended]
ROUNDS, WRITTEN = 4, 2

# An EMA that acts every second step, a schedule, samples that divide by no number of ranks.
SETTINGS: dict[str, Any] = {
    "run__rounds": ROUNDS,
    "run__checkpoint_every": 1,
    "run__keep_checkpoints": 10,
    "rollout__samples": 3,
    "rollout__steps": 2,
    "student__ema": {"decay": 0.9, "every": 2},
    "optimizer__warmup_rounds": 3,
}
LORA: dict[str, Any] = {"student__kind": "lora"}
HPZ = {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0, "overlap_comm": False}
CPU_OFFLOAD = {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": False}}


@dataclass
class Runs:
    """Makes run configs under one folder; runs them here or on several ranks."""

    world: Path
    root: Path
    group: Group

    def config(self, name: str, **changes: Any) -> Path:
        data = run_settings(self.world, self.root / name, **SETTINGS, **changes)
        return write_config(self.root / f"{name}.yaml", data)

    def go_on(self, name: str, source: str, **changes: Any) -> str:
        """Arguments that take up the checkpoint after `WRITTEN` rounds of the run `source`, in a folder of its own."""
        place = self.root / name / "checkpoints" / f"round-{WRITTEN:06d}"
        place.parent.mkdir(parents=True)
        shutil.copytree(self.root / source / "checkpoints" / place.name, place)
        return f"{self.config(name, **changes)}:auto"

    def on(self, ranks: int, *arguments: str) -> None:
        launch(ranks, *arguments, script=TRAIN_MANY)

    def here(self, argument: str) -> None:
        file, _, resume = argument.partition(":")
        train(DistilConfig.model_validate(yaml.safe_load(Path(file).read_text())), self.group, resume or "never")

    def rows(self, name: str) -> list[dict[str, float]]:
        return metrics(self.root / name)


@pytest.fixture(scope="module")
def runs(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory, group: Group) -> Runs:
    """Whole runs on two ranks at stages 3 and 2, full and LoRA, and all that two ranks take up from them."""
    runs = Runs(tiny_world, tmp_path_factory.mktemp("elastic"), group)
    kinds: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}
    whole = [
        str(runs.config(f"{kind}-{stage}", deepspeed=ds, **changes))
        for kind, changes in kinds.items()
        for stage, ds in (("zero3", ALL_SHARDED), ("zero2", "zero2"))
    ]
    persistent = runs.config("lora-persistent", deepspeed="zero3", **LORA)
    runs.on(2, *whole, str(persistent))
    runs.on(
        2,
        runs.go_on("full-3-to-2", "full-zero3", deepspeed="zero2"),
        runs.go_on("full-2-to-3", "full-zero2", deepspeed=ALL_SHARDED),
        runs.go_on("full-3-to-1", "full-zero3", deepspeed="zero1"),
        runs.go_on("full-2-to-0", "full-zero2", deepspeed="zero0"),
        runs.go_on("lora-3-to-2", "lora-zero3", deepspeed="zero2", **LORA),
        runs.go_on("lora-2-to-3", "lora-zero2", deepspeed=ALL_SHARDED, **LORA),
    )
    return runs


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("full-3-to-2", "full-zero3"),
        ("full-2-to-3", "full-zero2"),
        ("full-3-to-1", "full-zero3"),
        ("full-2-to-0", "full-zero2"),
        ("lora-3-to-2", "lora-zero3"),
        ("lora-2-to-3", "lora-zero2"),
    ],
)
def test_another_stage_on_as_many_ranks(runs: Runs, name: str, source: str) -> None:
    assert_close(runs.rows(name), runs.rows(source)[WRITTEN:])
    assert_same_export(runs.root / name, runs.root / source)


def test_averages_reach_parameters_that_stay_gathered(runs: Runs) -> None:
    """The shipped zero3 keeps small parameters, such as all of a LoRA, gathered on every rank after a step."""
    assert_close(runs.rows("lora-persistent"), runs.rows("lora-zero3"))
    assert_same_export(runs.root / "lora-persistent", runs.root / "lora-zero3")


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", ALL_SHARDED], ids=["0", "1", "2", "3"])
def test_two_ranks_to_one(runs: Runs, kind: str, stage: str) -> None:
    name = f"{kind}-one-{Path(stage).stem}"
    runs.here(runs.go_on(name, f"{kind}-zero3", deepspeed=stage, **(LORA if kind == "lora" else {})))
    assert_close(runs.rows(name), runs.rows(f"{kind}-zero3")[WRITTEN:])
    assert_same_export(runs.root / name, runs.root / f"{kind}-zero3")


def test_two_ranks_to_four_flat_and_hierarchical(runs: Runs, tmp_path: Path) -> None:
    """With hpZ as on two nodes of two: the copy of the weights that a node keeps must follow what is loaded, and the
    average while it is exported.
    """
    layout = {"zero_optimization": HPZ, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    hpz = tmp_path / "hpz.json"
    hpz.write_text(json.dumps(layout))
    runs.on(
        4,
        runs.go_on("full-four", "full-zero3", deepspeed=ALL_SHARDED),
        runs.go_on("lora-four", "lora-zero2", deepspeed="zero2", **LORA),
        runs.go_on("full-hpz", "full-zero3", deepspeed=str(hpz)),
        runs.go_on("full-hpz-again", "full-hpz", deepspeed=str(hpz)),
    )
    pairs = [("full-four", "full-zero3"), ("lora-four", "lora-zero2"), ("full-hpz", "full-zero3")]
    for name, source in [*pairs, ("full-hpz-again", "full-zero3")]:
        assert_close(runs.rows(name), runs.rows(source)[WRITTEN:])
        assert_same_export(runs.root / name, runs.root / source)


@pytest.mark.slow
def test_one_rank_to_two(runs: Runs) -> None:
    runs.here(str(runs.config("one", deepspeed="zero0")))
    runs.on(2, runs.go_on("one-to-two", "one", deepspeed=ALL_SHARDED))
    assert_close(runs.rows("one-to-two"), runs.rows("one")[WRITTEN:])


@pytest.mark.slow  # DeepSpeed compiles its CPU Adam, which takes two minutes
def test_to_offloaded_moments(runs: Runs, tmp_path: Path) -> None:
    """The moments of DeepSpeed's CPU Adam are those of torch's."""
    offload = tmp_path / "offload.json"
    offload.write_text(json.dumps({"zero_optimization": CPU_OFFLOAD, "optimizer": {"type": "AdamW", "params": {}}}))
    runs.here(runs.go_on("offloaded", "full-zero3", deepspeed=str(offload)))
    assert_close(runs.rows("offloaded"), runs.rows("full-zero3")[WRITTEN:])


@pytest.mark.parametrize("source", ["full-zero3", "full-zero2", "lora-zero3", "lora-zero2"])
def test_a_checkpoint_alone_gives_the_exported_weights(runs: Runs, source: str) -> None:
    """`opd-ds eval` draws checkpoints without an engine: the averages in the files are those that were exported."""
    checkpoint = runs.root / source / "checkpoints" / f"round-{ROUNDS:06d}"
    state = json.loads((checkpoint / "state.json").read_text())
    weights = consolidated_weights(checkpoint, state["shapes"])
    exported = exported_weights(runs.root / source)
    if source.startswith("full"):
        assert all(torch.equal(exported[name], value) for name, value in weights.items())
    else:  # an export has alpha = rank: the scale is in B
        scale = state["adapter"]["lora_alpha"] / state["adapter"]["r"]
        sums = [float(v.double().sum()) * (scale if ".lora_B." in name else 1) for name, v in weights.items()]
        assert sorted(sums) == pytest.approx(sorted(float(v.double().sum()) for v in exported.values()))


def exported_weights(folder: Path) -> dict[str, torch.Tensor]:
    lora = folder / "export" / "pytorch_lora_weights.safetensors"
    whole = folder / "export" / "transformer" / "diffusion_pytorch_model.safetensors"
    return load_file(lora if lora.is_file() else whole)


def assert_same_export(ours: Path, theirs: Path) -> None:
    mine, other = exported_weights(ours), exported_weights(theirs)
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=2e-6)
