"""Targets beyond the teacher: v_T + lambda (v_T - v_base), in every cut, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import BASE
from opd_ds.data import draw_prompts
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.errors import UserError
from opd_ds.plan.devices import parse_devices
from opd_ds.plan.memory import run_memory
from opd_ds.plan.passes import planned_passes
from opd_ds.runs.setup import Parts
from opd_ds.runs.train import train
from tests.ranks import TRAIN_MANY, launch
from tests.runs import assert_close, metrics
from tests.test_round import SGD, gradients
from tests.tiny import ALL_SHARDED, costs_of, run_settings, write_config

Build = Callable[..., tuple[RunConfig, Parts]]
SMALL = {"rollout__samples": 2, "rollout__steps": 3}
LAMBDA = 0.5


def plain_loop(config: DistilConfig, parts: Parts, world: Path, task: str) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, KL to the teacher, and gradient of one task from the pieces: three whole networks and an Euler loop."""
    family, samples, steps = parts.family, config.rollout.samples, config.rollout.steps
    student, base = family.load_transformer().requires_grad_(True), family.load_transformer()
    teacher = family.load_transformer(world / "other")
    prompts = (world / "prompts.txt").read_text().splitlines()
    cond = family.encode([prompts[i] for i in draw_prompts(len(prompts), samples, 0, 0, task)])
    uncond, sigmas = family.encode([""]), family.sigmas(steps)
    x = SampleNoise([sample_seed(0, 0, task, i) for i in range(samples)], family.latent_shape).draw(slice(None))
    loss, kl, guidance = torch.zeros(()), 0.0, config.tasks[task].teacher.guidance
    for j in range(steps):
        sigma, dt = sigmas[j].float().expand(samples), float(sigmas[j + 1] - sigmas[j])
        ours = family.guided_velocity(student, x, sigma, cond, uncond, config.rollout.guidance)
        with torch.no_grad():
            theirs = family.guided_velocity(teacher, x, sigma, cond, uncond, guidance)
            start = family.guided_velocity(base, x, sigma, cond, uncond, guidance)
        target = theirs + config.objective.extrapolation * (theirs - start)
        loss = loss + dt**2 / 2 * (ours - target).square().mean() / steps
        kl += dt**2 / 2 * float((ours.detach() - theirs).square().mean()) / steps
        x = x + dt * ours.detach()
    loss.backward()
    return loss.item(), kl, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def test_the_target_and_the_gradient_are_those_of_a_plain_loop(
    build_run: Build,
    tiny_world: Path,
    sgd: Callable[[int], str],
) -> None:
    """However the round is cut and wherever the base stands; the teacher's own guidance is the base's."""
    task = {"teacher": {"path": str(tiny_world / "other"), "guidance": 3.0}, "prompts": str(tiny_world / "prompts.txt")}
    changes = {**SMALL, "tasks": {"one": task}, "objective__extrapolation": LAMBDA, "optimizer": SGD}
    config, parts = build_run(deepspeed=sgd(0), **changes)
    assert isinstance(config, DistilConfig)
    loss, kl, expected = plain_loop(config, parts, tiny_world, "one")
    scale = max(float(value.abs().max()) for value in expected.values())
    cuts: list[dict[str, Any]] = [
        {"deepspeed": sgd(0), "rollout__mode": "fused"},
        {"deepspeed": sgd(2), "base__placement": "offload", "train__micro_batch": 4},
        {"deepspeed": sgd(3), "base__placement": "zero_inference", "rollout__gather": "per_layer"},
        {"deepspeed": sgd(1), "base__placement": "stream", "scoring__micro_batch": 2},
    ]
    for cut in cuts:
        parts = build_run(**changes, **cut)[1]
        found = gradients(parts)
        worst = max(float((found[name] - value).abs().max()) for name, value in expected.items())
        assert worst < 1e-5 * scale + 1e-7, (cut, worst, scale)
    means = parts.trainer.run_round(0).losses.means["one"]
    assert means.keys() == {"kl", "target_kl", "cond_kl", "uncond_kl"}
    report = build_run(**changes, deepspeed=sgd(0))[1].trainer.run_round(0)
    assert report.losses.loss == pytest.approx(loss, rel=1e-5)
    assert report.losses.means["one"]["target_kl"] == pytest.approx(loss, rel=1e-5)
    assert report.losses.means["one"]["kl"] == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("mode", ["buffered", "fused"])
def test_a_lora_students_base_is_its_network_without_adapters(build_run: Build, mode: str) -> None:
    """Bit for bit what a second copy says, under ZeRO-3 and after the student has moved away from it."""
    found = []
    for placement in ("auto", "resident"):
        _, parts = build_run(
            **SMALL,
            student__kind="lora",
            base__placement=placement,
            objective__extrapolation=LAMBDA,
            rollout__mode=mode,
            optimizer__lr=1e-2,
        )
        reports = [parts.trainer.run_round(index) for index in range(2)]
        found.append([(report.losses.loss, report.losses.means, report.grad_norm) for report in reports])
    assert found[0] == found[1]


def test_lambda_zero_is_the_run_without(build_run: Build) -> None:
    """Bit for bit; nothing more is loaded or asked, and older checkpoints may go on."""
    found = []
    for changes in ({}, {"objective__extrapolation": 0.0, "base__placement": "offload"}):
        _, parts = build_run(**SMALL, **changes)
        assert BASE not in parts.teachers._specs
        assert "extrapolation" not in parts.identity["objective"]
        report = parts.trainer.run_round(0)
        assert "target_kl" not in report.losses.means["one"]
        weights = parts.student.gather_weights(trainable_only=True)
        found.append((report.losses.loss, report.grad_norm, report.passes, weights))
    assert found[0][:3] == found[1][:3]
    assert all(torch.equal(value, found[1][3][name]) for name, value in found[0][3].items())


@pytest.mark.parametrize("mode", ["buffered", "fused"])
def test_an_anchor_that_is_the_base_is_not_asked_again(build_run: Build, tiny_world: Path, mode: str) -> None:
    """Where its guidance is the teacher's; and both parts add up, asked once or twice."""
    rounds = {}
    for guidance in (1.0, 1.5):  # task `one` has a teacher of guidance 1, task `two` one of 3
        for extrapolation in (0.0, LAMBDA):
            config, parts = build_run(
                **SMALL,
                objective__extrapolation=extrapolation,
                anchor={"path": str(tiny_world / "base"), "guidance": guidance, "weight": 0.1},
                rollout__mode=mode,
                run__rounds=1,
            )
            rounds[guidance, extrapolation] = report = parts.trainer.run_round(0)
            planned = planned_passes(config)
            assert report.passes == {"forward": planned.forward, "backward": planned.backward}
    pairs = 2 * 3
    once = rounds[1.0, LAMBDA].passes["forward"] - rounds[1.0, 0.0].passes["forward"]
    twice = rounds[1.5, LAMBDA].passes["forward"] - rounds[1.5, 0.0].passes["forward"]
    assert once == 2 * pairs  # of task `two` alone
    assert twice == (1 + 2) * pairs
    means = rounds[1.0, LAMBDA].losses.means
    total = sum(of["target_kl"] + 0.1 * of["anchor_kl"] for of in means.values())
    assert rounds[1.0, LAMBDA].losses.loss == pytest.approx(total, rel=1e-5)
    for name, of in means.items():
        assert of["anchor_kl"] == pytest.approx(rounds[1.0, 0.0].losses.means[name]["anchor_kl"], rel=1e-6)


def test_the_policy_gradient_has_the_same_target(build_run: Build) -> None:
    """At the drawing policy the estimator's value is the KL to the target, in expectation over nothing: ratio 1."""
    noisy = {"rollout__kernel": "flow", "rollout__noise_level": 0.7, "objective__extrapolation": LAMBDA}
    found = {}
    for method in ("closed_form", "ppo"):
        _, parts = build_run(**SMALL, **noisy, objective__method=method)
        found[method] = parts.trainer.run_round(0).losses
    assert found["ppo"].means == found["closed_form"].means
    assert found["ppo"].loss == pytest.approx(found["closed_form"].loss, rel=1e-4)


def test_a_full_students_base_is_planned(configured: Callable[..., DistilConfig]) -> None:
    """One more network, and one more velocity of every trained state; of a LoRA student the velocity alone."""
    devices = parse_devices("1xA100-40GB", "--gpus")

    def parts(**changes: Any) -> dict[str, float]:
        config = configured(deepspeed="zero2", **changes)
        found: dict[str, float] = {}
        for part in run_memory(config, costs_of(config), devices).device:
            found[part.name] = found.get(part.name, 0.0) + part.nbytes
        return found

    base = costs_of(configured()).base()
    whole = 4 * (base.parameters + base.buffers)
    for kind, copies in (("full", 1), ("lora", 0)):
        plain, beyond = parts(student__kind=kind), parts(student__kind=kind, objective__extrapolation=LAMBDA)
        assert beyond["teachers"] - plain["teachers"] == copies * whole
        anchored = parts(student__kind=kind, anchor={"path": "/else/full"})
        assert beyond["trajectory buffer: scored"] == anchored["trajectory buffer: scored"]
        assert beyond["trajectory buffer: scored"] > plain["trajectory buffer: scored"]
    away = parts(student__kind="full", objective__extrapolation=LAMBDA, base__placement="offload")
    assert away["teachers"] == parts(student__kind="full")["teachers"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"method": "sft", "extrapolation": 0.5}}, "method = 'sft' asks for none"),
        ({"objective__extrapolation": -0.1}, "greater than or equal to 0"),
        ({"objective__extrapolation": float("inf")}, "finite"),
        ({"base__deepspeed": "zero3"}, "deepspeed is read only with placement = 'zero_inference'"),
        (
            {"objective__extrapolation": 0.5, "base__placement": "stream", "rollout__mode": "fused"},
            "base.placement = 'stream' is brought in once a round",
        ),
    ],
)
def test_contradictions_are_named(
    configured: Callable[..., DistilConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configured(**changes)


@pytest.mark.extended
@pytest.mark.multirank
def test_two_ranks_train_what_one_trains_and_resume(tiny_world: Path, tmp_path: Path, group: Any) -> None:
    """With a remainder: a LoRA student per layer under ZeRO-3, and a full one; resumed it is the uninterrupted run."""
    hard = {"rollout__samples": 3, "objective__extrapolation": LAMBDA, "run__rounds": 2}
    kinds: dict[str, dict[str, Any]] = {
        "lora": {"student__kind": "lora", "rollout__gather": "per_layer", "deepspeed": ALL_SHARDED},
        "full": {"base__placement": "zero_inference", "deepspeed": ALL_SHARDED},
    }
    arguments = []
    for kind, changes in kinds.items():
        parts = {"whole": {}} | ({"first": {"run__rounds": 1}, "then": {}} if kind == "lora" else {})
        for name, more in parts.items():
            place = tmp_path / f"{kind}-{'whole' if name == 'whole' else 'cut'}"
            data = run_settings(tiny_world, place, **(hard | changes | more), run__checkpoint_every=1)
            file = write_config(tmp_path / f"{kind}-{name}.yaml", data)
            arguments.append(f"{file}:auto" if name == "then" else str(file))
    launch(2, *arguments, script=TRAIN_MANY)
    assert metrics(tmp_path / "lora-whole") == metrics(tmp_path / "lora-cut")
    for kind, changes in kinds.items():
        alone = run_settings(tiny_world, tmp_path / kind, **(hard | changes | {"deepspeed": "zero0"}))
        train(DistilConfig.model_validate(alone), group)
        assert_close(metrics(tmp_path / kind), metrics(tmp_path / f"{kind}-whole"))
    other = run_settings(tiny_world, tmp_path / "full-whole", **(hard | kinds["full"] | {"run__rounds": 3}))
    other["objective"]["extrapolation"] = 0.25
    with pytest.raises(
        UserError, match=r"objective\.extrapolation was 0\.5 and is now 0\.25.*--allow-change objective"
    ):
        train(DistilConfig.model_validate(other), group, "auto")
