"""`scoring.late`: a round trains on what was seen one optimizer step earlier."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from opd_ds.checkpoint.store import read_state
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import parse_config
from opd_ds.config.schema import RunConfig
from opd_ds.engine import Group, consolidated_weights
from opd_ds.errors import UserError
from opd_ds.plan.devices import parse_devices
from opd_ds.plan.memory import run_memory
from opd_ds.plan.zero import Phase
from opd_ds.runs.monitor import read_metrics
from opd_ds.runs.setup import Parts
from opd_ds.runs.train import train
from opd_ds.training.distillation import Distillation
from opd_ds.training.meter import RoundMeter
from tests.ranks import TRAIN_MANY, launch
from tests.runs import assert_close, metrics
from tests.test_teach import NFT, settings
from tests.tiny import costs_of, run_settings, write_config

Build = Callable[..., tuple[RunConfig, Parts]]
ROUNDS, WRITTEN = 4, 2
# Everything that may wait: an anchor, transitions, random steps, samples that divide by no number of ranks.
ALL: dict[str, Any] = {
    "scoring__late": 1,
    "run__rounds": ROUNDS,
    "run__checkpoint_every": 1,
    "run__keep_checkpoints": 10,
    "rollout__samples": 3,
    "rollout__steps": 3,
    "rollout__kernel": "flow",
    "rollout__noise_level": 0.7,
    "rollout__trained_steps": {"queries": 2},
    "objective__method": "ppo",
}


def weights_of(parts: Parts) -> dict[str, torch.Tensor]:
    return parts.student.gather_weights(trainable_only=True)


def test_a_round_trains_on_what_was_seen_before_the_last_step(build_run: Build, group: Group) -> None:
    """As computed by hand: rounds 1 and 2 are seen at the start, the third after the first step."""
    _, parts = build_run(scoring__late=1)
    losses = [parts.trainer.run_round(index).losses.loss for index in range(3)]
    _, plain = build_run()
    assert isinstance(plain.trainer, Distillation)
    expected = []

    def seen(index: int) -> Any:
        return plain.trainer._see(index, RoundMeter(group, index + 1))

    def trained(experience: Any) -> None:
        meter = RoundMeter(group, 1)
        found = plain.trainer._train(experience.data, 0, meter)
        plain.trainer._step(found, meter)
        expected.append(found.loss)

    first, second = seen(0), seen(1)
    trained(first)
    third = seen(2)
    trained(second)
    trained(third)
    assert losses == expected
    assert all(torch.equal(value, weights_of(plain)[name]) for name, value in weights_of(parts).items())
    _, prompt = build_run()
    on_policy = [prompt.trainer.run_round(index).losses.loss for index in range(2)]
    assert losses[0] == on_policy[0]
    assert losses[1] != on_policy[1]


def test_no_round_is_dropped_and_a_run_that_goes_on_repeats_it(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    """Bit for bit; as many passes as without; nothing waits at the end; without it nothing is kept."""
    anchor = {"path": str(tiny_world / "other"), "guidance": 2.0}
    config = run_settings(tiny_world, tmp_path / "whole", **ALL, anchor=anchor)
    train(DistilConfig.model_validate(config), group)
    checkpoints = tmp_path / "whole" / "checkpoints"
    name = f"round-{WRITTEN:06d}"
    shutil.copytree(checkpoints / name, tmp_path / "resumed" / "checkpoints" / name)
    config["run"]["output_dir"] = str(tmp_path / "resumed")
    train(DistilConfig.model_validate(config), group, "auto")
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "whole")[WRITTEN:]
    states = [read_state(checkpoints / f"round-{done:06d}")["copies"]["waiting"]["round"] for done in (WRITTEN, ROUNDS)]
    assert states == [WRITTEN, None]
    final = [folder / "checkpoints" / f"round-{ROUNDS:06d}" for folder in (tmp_path / "whole", tmp_path / "resumed")]
    whole, again = (consolidated_weights(place, read_state(place)["shapes"]) for place in final)
    assert all(torch.equal(value, again[key]) for key, value in whole.items())

    config["run"]["output_dir"], config["scoring"] = str(tmp_path / "prompt"), {"late": 0}
    train(DistilConfig.model_validate(config), group)
    assert "waiting" not in read_state(tmp_path / "prompt" / "checkpoints" / name)["copies"]
    forward = {
        folder: sum(row["passes/forward"] for row in read_metrics(tmp_path / folder / "metrics.jsonl"))
        for folder in ("whole", "prompt")
    }
    assert forward["whole"] == forward["prompt"]
    config["scoring"] = {"late": 1}
    with pytest.raises(UserError, match=r"scoring\.late was None and is now 1; set it back"):
        train(DistilConfig.model_validate(config), group, "auto")


@pytest.mark.extended
@pytest.mark.multirank
def test_what_waits_goes_on_on_any_number_of_ranks(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    def config(name: str) -> Path:
        data = run_settings(tiny_world, tmp_path / name, **ALL)
        return write_config(tmp_path / f"{name}.yaml", data)

    def go_on(name: str, source: str) -> str:
        place = Path(name, "checkpoints", f"round-{WRITTEN:06d}")
        shutil.copytree(tmp_path / source / place.relative_to(name), tmp_path / place)
        return f"{config(name)}:auto"

    train(DistilConfig.model_validate(yaml.safe_load(config("one").read_text())), group)
    launch(2, str(config("two")), go_on("one-to-two", "one"), script=TRAIN_MANY)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert_close(two, one)
    assert_close(metrics(tmp_path / "one-to-two"), one[WRITTEN:])
    file, _, resume = go_on("two-to-one", "two").partition(":")
    train(DistilConfig.model_validate(yaml.safe_load(Path(file).read_text())), group, resume)
    assert_close(metrics(tmp_path / "two-to-one"), two[WRITTEN:])


def test_a_plan_counts_what_waits(configured: Callable[..., DistilConfig]) -> None:
    """The next round's buffer and prompts, in every phase after loading; a checkpoint has them on the host."""
    devices = parse_devices("1xH100-80GB", "--gpus")
    prompt, late = (configured(scoring__late=value) for value in (0, 1))
    before, after = (run_memory(config, costs_of(config), devices) for config in (prompt, late))
    kept = ("trajectory buffer", "trajectory buffer: scored", "encoded prompts")
    buffers = sum(part.nbytes for part in before.device if part.name in kept and part.alive(Phase.TRAIN))
    assert buffers > 0
    for phase in Phase:
        more = after.in_phase(phase) - before.in_phase(phase)
        assert more == pytest.approx(0.0 if phase is Phase.LOAD else buffers)
    assert after.host_peak(1) > before.host_peak(1)


def test_where_nothing_can_wait(tiny_world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"trains while it rolls out, so scoring.late = 1 is not possible; set scoring.late to 0"
    ):
        parse_config(run_settings(tiny_world, tmp_path, scoring__late=1, rollout__mode="fused"))
    with pytest.raises(UserError, match=r"scoring\.late = 1 is for teachers; learning from rewards has none"):
        parse_config(settings(tiny_world, tmp_path, NFT, scoring__late=1))
