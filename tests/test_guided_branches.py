"""The two branches of a guided velocity: their errors measured, and matched apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import parse_config
from opd_ds.config.schema import RunConfig
from opd_ds.data import draw_prompts
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.errors import UserError
from opd_ds.models import guide
from opd_ds.plan.passes import planned_passes
from opd_ds.runs.setup import Parts
from opd_ds.testing.family_checks import build, tiny_module
from tests.test_round import SGD, gradients
from tests.tiny import run_settings

Build = Callable[..., tuple[RunConfig, Parts]]
SMALL = {"rollout__samples": 2, "rollout__steps": 3, "run__rounds": 1}
APART = {"guided": "apart", "direction_weight": 4.0}


def errors(config: DistilConfig, parts: Parts, world: Path) -> tuple[dict[str, float], float, dict[str, Tensor]]:
    """Of the one task `two`, from plain networks: the measured KLs, the loss that matches branches apart and its
    gradient, with target beyond the teacher and an anchor where the config has them.
    """
    family, samples, steps = parts.family, config.rollout.samples, config.rollout.steps
    student, base = family.load_transformer().requires_grad_(True), family.load_transformer()
    other = family.load_transformer(world / "other")
    prompts = (world / "prompts.txt").read_text().splitlines()
    cond = family.encode([prompts[i] for i in draw_prompts(len(prompts), samples, 0, 0, "two")])
    nothing, sigmas = family.encode([""]).expand(samples), family.sigmas(steps)
    x = SampleNoise([sample_seed(0, 0, "two", i) for i in range(samples)], family.latent_shape).draw(slice(None))
    objective, anchor = config.objective, config.anchor
    loss, kls = torch.zeros(()), dict.fromkeys(("kl", "cond_kl", "uncond_kl"), 0.0)
    for j in range(steps):
        sigma, dt = sigmas[j].float().expand(samples), float(sigmas[j + 1] - sigmas[j])

        def both(network: Any, at: Tensor = x, sigma: Tensor = sigma) -> tuple[Tensor, Tensor]:
            return family.velocity(network, at, sigma, cond), family.velocity(network, at, sigma, nothing)

        def error(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], weight: float = dt**2 / 2) -> Tensor:
            direction = (ours[0] - ours[1]) - (theirs[0] - theirs[1])
            apart = (ours[0] - theirs[0]).square().mean() + objective.direction_weight * direction.square().mean()
            return weight * apart / steps

        ours = both(student)
        with torch.no_grad():
            theirs, start = both(other), both(base)
            guided = [u + g * (c - u) for (c, u), g in ((ours, 2.0), (theirs, config.teachers["two"].guidance))]
            differences = (guided[0] - guided[1], ours[0] - theirs[0], ours[1] - theirs[1])
            for name, difference in zip(kls, differences, strict=True):
                kls[name] += dt**2 / 2 * float(difference.square().mean()) / steps
        target = [t + objective.extrapolation * (t - b) for t, b in zip(theirs, start, strict=True)]
        loss = loss + error(ours, (target[0], target[1]))
        if anchor is not None:
            loss = loss + anchor.weight * error(ours, start)
        x = x + dt * guided[0]
    loss.backward()
    return kls, loss.item(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.fixture
def task(tiny_world: Path) -> dict[str, Any]:
    prompts = str(tiny_world / "prompts.txt")
    return {"two": {"teacher": {"path": str(tiny_world / "other"), "guidance": 3.0}, "prompts": prompts}}


@pytest.mark.parametrize("beyond", [False, True], ids=["teacher", "beyond, with an anchor"])
def test_branches_apart_are_those_of_a_plain_loop(
    build_run: Build,
    tiny_world: Path,
    task: dict[str, Any],
    sgd: Callable[[int], str],
    beyond: bool,
) -> None:
    changes: dict[str, Any] = {**SMALL, "tasks": task, "objective": dict(APART), "optimizer": SGD}
    if beyond:
        changes["objective"]["extrapolation"] = 0.5
        changes["anchor"] = {"path": str(tiny_world / "base"), "guidance": 2.5, "weight": 0.3}
    config, parts = build_run(deepspeed=sgd(0), **changes)
    assert isinstance(config, DistilConfig)
    kls, loss, expected = errors(config, parts, tiny_world)
    scale = max(float(value.abs().max()) for value in expected.values())
    for cut in ({"deepspeed": sgd(3), "train__micro_batch": 4}, {"deepspeed": sgd(0), "rollout__mode": "fused"}):
        parts = build_run(**changes, **cut)[1]
        found = gradients(parts)
        worst = max(float((found[name] - value).abs().max()) for name, value in expected.items())
        assert worst < 1e-5 * scale + 1e-7, (cut, worst, scale)
    report = build_run(**changes, deepspeed=sgd(0))[1].trainer.run_round(0)
    assert report.losses.loss == pytest.approx(loss, rel=1e-5)
    means = report.losses.means["two"]
    assert {name: means[name] for name in kls} == pytest.approx(kls, rel=1e-5)


@pytest.mark.parametrize("mode", ["buffered", "fused"])
def test_errors_of_branches_are_measured_without_further_passes(build_run: Build, tiny_world: Path, mode: str) -> None:
    """Where student and teacher have two: task `one`, whose teacher has none, says nothing of them."""
    task = {"teacher": {"path": str(tiny_world / "other"), "guidance": 3.0}, "prompts": str(tiny_world / "prompts.txt")}
    config, parts = build_run(**SMALL, tasks__two=task, rollout__mode=mode)
    assert isinstance(config, DistilConfig)
    kls = errors(config, parts, tiny_world)[0]
    report = parts.trainer.run_round(0)
    planned = planned_passes(config)
    assert report.passes == {"forward": planned.forward, "backward": planned.backward}
    assert report.losses.means["one"].keys() == report.losses.by_step["one"].keys() == {"kl"}
    assert report.losses.means["two"] == pytest.approx(kls, rel=1e-5)


def test_a_student_that_is_its_own_teacher_has_nothing_to_match(build_run: Build, tiny_world: Path) -> None:
    """Exactly, also with another guidance: branches are what they are."""
    task = {"teacher": {"path": str(tiny_world / "base"), "guidance": 4.5}, "prompts": str(tiny_world / "prompts.txt")}
    for kind in ("lora", "full"):
        _, parts = build_run(**SMALL, tasks={"self": task}, student__kind=kind, objective=APART, precision="bf16")
        report = parts.trainer.run_round(0)
        assert (report.losses.loss, report.grad_norm) == (0.0, 0.0)
        assert report.losses.means["self"]["kl"] > 0  # of the two guidances


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen_image", "wan"])
def test_a_guided_velocity_is_the_same_with_its_branches(name: str, tmp_path: Path) -> None:
    """Bit for bit, in every way that families have of guiding."""
    family = build(name, tiny_module(name).write(tmp_path), width=32)
    network, generator = family.load_transformer(), torch.Generator().manual_seed(0)
    cond, uncond = family.encode(["a red 3", "a house"]), family.encode([""])
    x, sigma = torch.randn(2, *family.latent_shape, generator=generator), torch.full((2,), 0.5)
    with torch.no_grad():
        for guidance in (1.0, 3.0):
            found = guide(family, network, x, sigma, cond, uncond, guidance)
            assert torch.equal(found.velocity, family.guided_velocity(network, x, sigma, cond, uncond, guidance))
            assert (found.branches is None) == (family.passes(guidance) == 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"tasks\.one\.teacher\.guidance = 1 there is one alone"),
        ({"rollout__guidance": 1.0, "tasks__one__teacher__guidance": 2.0}, r"rollout\.guidance = 1 there is one alone"),
        (
            {"tasks__one__teacher__guidance": 2.0, "anchor": {"path": "x", "guidance": 1.0}},
            r"anchor\.guidance = 1 there is one alone",
        ),
        ({"objective": {"method": "sft", "guided": "apart"}}, "beside method = 'sft'; use 'closed_form'"),
    ],
)
def test_what_has_no_two_branches_is_refused(
    tiny_world: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(run_settings(tiny_world, tmp_path, **({"objective": APART} | changes)))


def test_a_family_with_embedded_guidance_is_refused(configured: Callable[..., DistilConfig], tmp_path: Path) -> None:
    from opd_ds.training.fused import FusedDistillation

    config = configured(objective=APART, tasks__one__teacher__guidance=2.0)
    family = build("flux", tiny_module("flux").write(tmp_path / "flux"), width=32)
    with pytest.raises(UserError, match=r"objective\.guided = 'apart': .* takes the guidance as an input"):
        FusedDistillation.check(config, family)
