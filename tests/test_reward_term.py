"""`reward_term`: distillation and rewards in one loss, on the same transitions and forwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import parse_config
from opd_ds.config.schema import RunConfig
from opd_ds.config.without_effect import settings_without_effect
from opd_ds.diffusion import kernel, kl_weight
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.plan.devices import parse_devices
from opd_ds.plan.memory import buffer_bytes, decoding
from opd_ds.plan.network import find_model
from opd_ds.plan.passes import planned_passes
from opd_ds.plan.zero import Phase
from opd_ds.runs.setup import Parts
from opd_ds.runs.train import train
from opd_ds.testing.tiny.sd3 import PROMPTS
from opd_ds.training.distillation import Distillation
from opd_ds.training.meter import RoundMeter
from tests.ranks import TRAIN_MANY, launch
from tests.runs import assert_close, metrics
from tests.test_round import SGD, gradients, own_teacher
from tests.test_teach import Redness, redness  # noqa: F401  # a fixture
from tests.tiny import run_settings, with_changes, write_config

Build = Callable[..., tuple[RunConfig, Parts]]
ROUNDS, WRITTEN = 4, 2
TERM: dict[str, Any] = {"weight": 0.5, "group": 2, "clip": 0.1}


def rewarded(world: Path, **changes: Any) -> dict[str, Any]:
    """Changes to `run_settings`: one task with a teacher and a reward, and a rollout with noise."""
    task = own_teacher(world, path=str(world / "other"), guidance=1.0) | {"rewards": ["jpeg_compressibility"]}
    noisy = {"rollout__kernel": "flow", "rollout__noise_level": 0.7, "rollout__guidance": 1.0}
    return {"tasks": {"t": task}, "reward_term": dict(TERM), "deepspeed": "zero0"} | noisy | changes


def test_loss_and_gradient_are_the_sum_of_both(
    build_run: Build,
    tiny_world: Path,
    group: Group,
    sgd: Callable[[int], str],
    redness: Redness,  # noqa: F811
) -> None:
    """Against both formulas written out, with two images that have no score."""
    redness.unknown = PROMPTS[0]
    said: list[Tensor] = []
    score = redness.score
    redness.score = lambda *asked: said.append(score(*asked)) or said[-1]  # type: ignore[method-assign, func-returns-value]
    changes = rewarded(tiny_world, deepspeed=sgd(0), optimizer=SGD, rollout__samples=8, rollout__micro_batch=8)
    _, parts = build_run(**changes, reward_term__reward_attempts=1)
    found = gradients(parts)
    rewards = said[0].double().view(4, 2)
    scored = rewards.isfinite()
    assert 0 < int((~scored).sum()) < 8
    deviation = rewards[scored].std(correction=0)
    advantage = ((rewards - rewards.nanmean(1, keepdim=True)) / (deviation + 1e-4)).flatten().float()

    config, plain = build_run(**changes, reward_term__reward_attempts=1)
    assert isinstance(config, DistilConfig)
    assert isinstance(plain.trainer, Distillation)
    (data,) = plain.trainer._see(0, RoundMeter(group, 1)).data.values()
    pairs = data.buffer.pairs(slice(None))
    sigmas = plain.family.sigmas(config.rollout.steps)
    states, sigma, cond = data.buffer.inputs(pairs)
    network, known = plain.student.module, data.known.at(pairs)
    velocity = plain.family.guided_velocity(network, states, sigma, cond, cond[:1], 1.0)
    table = kernel("flow", 0.7).coefficients(sigmas)
    to_teacher = (velocity - known.teacher).square().flatten(1).mean(1)
    distilled = kl_weight(table)[pairs.step] * to_teacher
    b = table.b[pairs.step].float().view(-1, 1, 1, 1)
    along = (b * (velocity - velocity.detach()) * known.noise).flatten(1).mean(1)  # on-policy: a ratio of 1
    counts = (table.std[pairs.step] > 0) & scored.flatten()[pairs.sample]
    policy = torch.where(counts, -along.exp() * torch.nan_to_num(advantage)[pairs.sample], 0.0)
    loss = distilled.mean() + 0.5 * policy.sum() / (scored.sum() * config.trained_steps)
    trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
    expected = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    scale = max(float(value.abs().max()) for value in found.values())
    assert scale > 0
    for name, gradient in zip(trained, expected, strict=True):
        assert float((found[name] - (0 if gradient is None else gradient)).abs().max()) < 1e-4 * scale, name
    # And each part counts.
    more = gradients(build_run(**changes, reward_term__weight=50.0)[1])
    assert max(float((more[name] - found[name]).abs().max()) for name in found) > 0.1 * scale


def test_the_reward_rises_above_plain_distillation(
    build_run: Build,
    tiny_world: Path,
    redness: Redness,  # noqa: F811
) -> None:
    """With a weight that counts against one that does not, from the same draws."""
    means = {}
    for weight in (1e-9, 200.0):
        changes = rewarded(tiny_world, rollout__samples=32, rollout__micro_batch=32, train__micro_batch=128)
        changes |= {"optimizer__lr": 3e-3, "reward_term": TERM | {"group": 8, "weight": weight}}
        _, parts = build_run(**changes)
        reports = [parts.trainer.run_round(index) for index in range(14)]
        means[weight] = sum(report.scores["t/mean"] for report in reports[-2:]) / 2
        spread = reports[0].scores["t/std"] / 64**0.5
    assert means[200.0] - means[1e-9] > 4 * spread, (means, spread)


def test_ranks_and_resumes_learn_the_same(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    """With what waits a round (`scoring.late`), advantages included: bit for bit on one rank, to rounding on two."""

    def config(name: str) -> Path:
        rounds = {"run__rounds": ROUNDS, "run__checkpoint_every": 1, "run__keep_checkpoints": 10, "scoring__late": 1}
        changes = rewarded(tiny_world, rollout__samples=6, **rounds)
        return write_config(tmp_path / f"{name}.yaml", run_settings(tiny_world, tmp_path / name, **changes))

    def go_on(name: str, source: str) -> None:
        place = Path("checkpoints", f"round-{WRITTEN:06d}")
        shutil.copytree(tmp_path / source / place, tmp_path / name / place)
        train(DistilConfig.model_validate(yaml.safe_load(config(name).read_text())), group, "auto")

    train(DistilConfig.model_validate(yaml.safe_load(config("one").read_text())), group)
    one = metrics(tmp_path / "one")
    assert {"rollout/t/mean", "task/t/policy", "task/t/kl"} <= one[0].keys()
    go_on("again", "one")
    assert metrics(tmp_path / "again") == one[WRITTEN:]
    launch(2, str(config("two")), script=TRAIN_MANY)
    assert_close(metrics(tmp_path / "two"), one, rel=1e-3)
    go_on("two-to-one", "two")
    assert_close(metrics(tmp_path / "two-to-one"), metrics(tmp_path / "two")[WRITTEN:], rel=1e-3)


def test_a_round_without_any_score_ends_the_run(
    build_run: Build,
    tiny_world: Path,
    redness: Redness,  # noqa: F811
) -> None:
    redness.failing = 99
    _, parts = build_run(**rewarded(tiny_world, reward_term=TERM | {"reward_attempts": 1}))
    with pytest.raises(UserError, match="the rewards of task t scored none of its 4 images in 1 attempts"):
        parts.trainer.run_round(0)


def test_a_plan_counts_transitions_and_decoding(tiny_world: Path, tmp_path: Path) -> None:
    """The same passes as without; two more latents of every state, and images decoded while the teachers are asked."""
    changes = rewarded(tiny_world)
    term = DistilConfig.model_validate(run_settings(tiny_world, tmp_path, **changes))
    plain = DistilConfig.model_validate(run_settings(tiny_world, tmp_path, **changes | {"reward_term": None}))
    watched = plain.model_copy(update={"watch": plain.watch.model_copy(update={"every": 1})})  # images are finished
    assert planned_passes(term) == planned_passes(watched)
    device = parse_devices("1xcpu", "--gpus")
    kept = [buffer_bytes(config, find_model(config), device)["states"] for config in (plain, term)]
    assert kept[1] == 3 * kept[0]
    assert (decoding(plain), decoding(term)) == ({Phase.DECODE}, {Phase.SCORE})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_term__weight": 0}, "reward_term.weight = 0: allowed: more than 0"),
        ({"reward_term__group": 3}, "rollout.samples = 4 is no multiple of reward_term.group = 3"),
        ({"rollout__noise_level": 0.0}, "reward_term weighs drawn transitions.* rollout.noise_level = 0 draws none"),
        ({"rollout__mode": "fused"}, "rewards of reward_term come after a rollout; set rollout.mode to 'buffered'"),
        ({"objective": {"method": "sft"}}, "objective.method = 'closed_form' only, not 'sft'"),
        ({"tasks__t__rewards": []}, "tasks.t.rewards: reward_term learns from every task's rewards, and here is none"),
        ({"tasks__t__rewards": [{"name": "jpeg_compressibility", "weight": 0}]}, "here is none with a weight"),
    ],
)
def test_contradictions_are_named(tiny_world: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = with_changes(run_settings(tiny_world, tmp_path, **rewarded(tiny_world)), changes)
    with pytest.raises(UserError, match=message):
        parse_config(data)


def test_a_weight_without_the_term_is_named(tiny_world: Path, tmp_path: Path) -> None:
    changes = rewarded(tiny_world) | {"reward_term": None}
    changes["tasks"]["t"]["rewards"] = [{"name": "jpeg_compressibility", "weight": 2}]
    config = parse_config(run_settings(tiny_world, tmp_path, **changes))
    lines = "\n".join(settings_without_effect(config))
    assert "tasks.t.rewards: the weight of jpeg_compressibility is not read without reward_term" in lines
