"""The objectives that a distillation may be run with, on equal terms: one trainer, one buffer, other losses."""

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
from opd_ds.diffusion import kernel
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.runs.setup import Parts, prepare
from opd_ds.training.objectives import ClosedFormLoss, DrawnTransitions, PolicyGradientLoss
from tests.test_round import own_teacher
from tests.tiny import TARGETS, run_settings

Build = Callable[..., tuple[RunConfig, Parts]]
SDE = {"rollout__kernel": "flow", "rollout__noise_level": 0.7}
# In the order of their cost; each is a config value.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "closed form": {},
    "closed form, SDE": SDE,
    # Its gradient varies most: with a third of these samples, some random teachers are not approached in twelve rounds.
    "PPO-style": SDE | {"objective__method": "ppo", "rollout__samples": 48},
    "velocity": {"objective": {"target": "velocity", "weighting": "uniform"}},
    "one query": {"rollout__trained_steps": {"queries": 1}},
    "one low-noise query": {"rollout__trained_steps": {"queries": 1, "favour": "low_noise"}},
    "two high-noise queries": {"rollout__trained_steps": {"queries": 2, "favour": "high_noise", "spread": True}},
    "SFT": {"objective__method": "sft"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_comes_nearer_to_its_teacher(build_run: Build, tiny_world: Path, name: str) -> None:
    """The measured KL falls; SFT's is measured against single images and keeps their spread."""
    task = own_teacher(tiny_world, path=str(tiny_world / "other"), guidance=1.0)
    changes = {"rollout__samples": 16, "rollout__guidance": 1.0, "rollout__micro_batch": 16, "train__micro_batch": 64}
    _, parts = build_run(tasks={"t": task}, optimizer={"lr": 3e-3}, deepspeed="zero0", **changes | OBJECTIVES[name])
    measure = "flow_error" if name == "SFT" else "kl"
    kls = [parts.trainer.run_round(index).losses.means["t"][measure] for index in range(12)]
    assert sum(kls[-3:]) < (0.95 if name == "SFT" else 0.85) * sum(kls[:3]), kls


def test_the_policy_gradients_mean_is_the_closed_form(tiny_world: Path, tmp_path: Path) -> None:
    """The loss of a `ppo` run, over many redrawn transitions, has the gradient of the `closed_form` run."""
    torch.manual_seed(0)
    sigmas = torch.linspace(1, 0, 5, dtype=torch.float64)
    table = kernel("flow", 0.7).coefficients(sigmas)

    def gradient(method: str, count: int) -> tuple[Tensor, Tensor]:
        settings = run_settings(tiny_world, tmp_path, **SDE, objective__method=method)
        kind = PolicyGradientLoss if method == "ppo" else ClosedFormLoss
        loss = kind(DistilConfig.model_validate(settings), table, sigmas, torch.device("cpu"))
        velocity = student.expand(count, -1, -1, -1).clone().requires_grad_()
        noise = torch.randn(velocity.shape)
        known = DrawnTransitions(teacher.expand_as(velocity), velocity=velocity.detach(), noise=noise)
        loss(velocity, torch.full((count,), 2), known)[0].sum().backward()
        assert velocity.grad is not None
        return velocity.grad.mean(0), velocity.grad.std(0)

    student, teacher = torch.randn(1, 2, 2, 2), torch.randn(1, 2, 2, 2)
    exact, none = gradient("closed_form", 2)
    mean, spread = gradient("ppo", 100_000)
    assert not none.any()
    torch.testing.assert_close(mean, exact, rtol=0, atol=float(5 * spread.max()) / 100_000**0.5)
    assert (spread > 0.1 * exact.abs().mean()).all()


def test_sft_learns_from_the_teachers_pictures_alone(
    build_run: Build, tiny_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the teacher's own final latents, and nobody is asked at the student's states."""
    monkeypatch.setattr(RunConfig, "shows_rollouts", lambda self, index: True)
    task = own_teacher(tiny_world, path=str(tiny_world / "other"), guidance=1.0)
    _, parts = build_run(tasks={"t": task}, objective__method="sft", rollout__guidance=1.0)
    report = parts.trainer.run_round(0)
    # 4 samples: 4 steps of the teacher, then the student's training.
    assert report.passes == {"forward": 4 * (4 + 4), "backward": 4 * 4}
    started = {"student__start": str(tiny_world / "other")}  # a student that is the teacher
    _, as_teacher = build_run(tasks={"t": task}, rollout__guidance=1.0, **started)
    torch.testing.assert_close(report.rolled["t"].final, as_teacher.trainer.run_round(0).rolled["t"].final)


# ---- absorbed guidance ----


def absorbing(world: Path, **changes: Any) -> dict[str, Any]:
    """As the recipes `absorb_...`: a guided teacher, here the base itself, and a LoRA student without guidance."""
    settings = {"student__kind": "lora", "rollout__guidance": 1.0, "tasks": {"self": own_teacher(world, guidance=4.5)}}
    return settings | {"objective": {"target": "velocity", "weighting": "uniform"}} | changes


def test_absorbed_guidance_halves_the_students_passes(build_run: Build, tiny_world: Path) -> None:
    counted = {}
    for guidance in (1.0, 4.5):
        _, parts = build_run(**absorbing(tiny_world, rollout__guidance=guidance))
        counted[guidance] = parts.trainer.run_round(0).passes
    pairs, drawn = 4 * 4, 4 * 3  # samples, steps; nobody looks at the picture behind the last trained state
    assert counted[1.0] == {"forward": drawn + 2 * pairs + pairs, "backward": pairs}
    assert counted[4.5] == {"forward": 2 * (drawn + pairs + pairs), "backward": 2 * pairs}


def test_a_model_absorbs_its_own_guidance(build_run: Build, tiny_world: Path) -> None:
    """The error of the unguided student to the guided base falls, and the base, in its own network, stays as it is."""
    changes = {"rollout__samples": 16, "rollout__micro_batch": 16, "train__micro_batch": 64, "optimizer__lr": 1e-2}
    _, parts = build_run(**absorbing(tiny_world, **changes), deepspeed="zero0")
    before = parts.student.gather_weights(trainable_only=False)
    losses = [parts.trainer.run_round(index).losses.loss for index in range(16)]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3]), losses
    after = parts.student.gather_weights(trainable_only=False)
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "lora" not in name)


# ---- the anchor ----


def test_an_anchor_adds_its_share(build_run: Build, tiny_world: Path) -> None:
    """A student that is its own teacher has only the anchor's part: weight times what the anchor alone would be."""
    other = {"path": str(tiny_world / "other"), "guidance": 1.0}
    _, alone = build_run(tasks={"self": own_teacher(tiny_world) | {"teacher": other}})
    expected = alone.trainer.run_round(0).losses
    for mode in ("buffered", "fused"):
        _, parts = build_run(
            tasks={"self": own_teacher(tiny_world)}, anchor=other | {"weight": 0.25}, rollout__mode=mode
        )
        found = parts.trainer.run_round(0).losses
        assert found.loss == pytest.approx(0.25 * expected.loss, rel=1e-5)
        assert found.means["self"]["anchor_kl"] == pytest.approx(expected.means["self"]["kl"], rel=1e-5)
        assert found.means["self"]["kl"] == pytest.approx(0.0, abs=1e-12)


def test_an_anchor_may_be_a_lora_beside_lora_teachers(build_run: Build, tiny_world: Path) -> None:
    adapter = own_teacher(tiny_world, path=str(tiny_world / "adapter"))
    anchor = {"path": str(tiny_world / "adapter2"), "guidance": 2.0, "placement": "offload"}
    _, parts = build_run(tasks={"t": adapter}, anchor=anchor)
    means = parts.trainer.run_round(0).losses.means["t"]
    assert means["anchor_kl"] > 0
    assert means["anchor_kl"] != means["kl"]


# ---- where a student starts ----


@pytest.mark.parametrize(
    ("kind", "start"), [("lora", "adapter"), ("full", "adapter"), ("full", "other")], ids=["lora", "merged", "full"]
)
def test_a_student_that_starts_at_its_teacher_has_nothing_to_learn(
    build_run: Build, tiny_world: Path, kind: str, start: str
) -> None:
    task = own_teacher(tiny_world, path=str(tiny_world / start))
    student = {"kind": kind, "start": str(tiny_world / start), "lora": {"rank": 4, "alpha": 8, "targets": TARGETS}}
    _, parts = build_run(tasks={"t": task}, student=student)
    report = parts.trainer.run_round(0)
    assert report.losses.loss < 1e-9  # a merged LoRA rounds otherwise than one beside its weights
    _, parts = build_run(tasks={"t": task}, student=student | {"start": None})
    assert parts.trainer.run_round(0).losses.loss > 1e-4


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"kind": "lora", "start": "other"}, "is a full checkpoint and student.kind = 'lora'; set model.path to it"),
        ({"kind": "lora", "start": "adapter2"}, "has rank 2, student.lora.rank is 4; set it"),
        ({"kind": "full", "start": "prompts.txt"}, "student.start = .*no safetensors file"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    tiny_world: Path, tmp_path: Path, group: Group, student: dict[str, Any], message: str
) -> None:
    settings = run_settings(tiny_world, tmp_path / "out")
    settings["student"] |= student | {"start": str(tiny_world / student["start"])}
    with pytest.raises(UserError, match=message):
        prepare(parse_config(settings), group)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective__method": "ppo"}, "rollout.noise_level = 0 draws none"),
        ({"objective": {"method": "sft", "target": "velocity"}}, "has an objective of its own"),
        (SDE | {"objective__method": "ppo", "rollout__mode": "fused"}, "knows objective.method = 'closed_form' only"),
        ({"rollout__trained_steps": {"fraction": 0.5, "favour": "low_noise"}}, "is for random steps"),
        ({"rollout__trained_steps": {"queries": 1, "spread": True}}, "is for several random steps"),
        (
            {"anchor": {"path": "x", "placement": "offload"}, "rollout__mode": "fused"},
            "anchor.placement = 'offload' is brought in once a round",
        ),
    ],
)
def test_contradictions_are_named(tiny_world: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(run_settings(tiny_world, tmp_path, **changes))
