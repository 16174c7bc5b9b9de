"""The round in one process: exact zeros, invariances, one step, frozen teachers, clear stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.schema import RunConfig
from opd_ds.engine import Group
from opd_ds.errors import NonFiniteError, UserError
from opd_ds.runs.setup import Parts, prepare
from tests.tiny import run_settings, write_lora, write_pipeline

Build = Callable[..., tuple[RunConfig, Parts]]
SGD = {"lr": 1.0, "max_grad_norm": 0.0}
FEW = {"rollout__steps": 2, "rollout__samples": 2}


def gradients(parts: Parts) -> dict[str, torch.Tensor]:
    """What one SGD step of size 1 took away from the weights: the gradient, whatever the engine did to get it."""
    before = parts.student.gather_weights(trainable_only=True)
    parts.trainer.run_round(0)
    after = parts.student.gather_weights(trainable_only=True)
    return {name: before[name] - after[name] for name in before}


def own_teacher(world: Path, **changes: Any) -> dict[str, Any]:
    return {"teacher": {"path": str(world / "base"), "guidance": 2.0, **changes}, "prompts": str(world / "prompts.txt")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("placement", ["resident", "offload", "zero_inference", "fused"])
def test_a_student_that_is_its_own_teacher_has_loss_zero(
    build_run: Build, tiny_world: Path, placement: str, precision: str
) -> None:
    """Exactly 0 with equal micro-batches of scoring and training, in every placement."""
    fused = placement == "fused"
    task = own_teacher(tiny_world, placement="resident" if fused else placement)
    mode = "fused" if fused else "buffered"
    # deepspeed of the teacher is read with zero_inference only
    _, parts = build_run(
        precision=precision, tasks={"self": task}, rollout__mode=mode, student__gradient_checkpointing=True, **FEW
    )
    report = parts.trainer.run_round(0)
    assert report.losses.loss == 0.0
    assert report.grad_norm == 0.0


def test_a_lora_student_that_is_its_own_lora_teacher_has_loss_zero(build_run: Build, tiny_world: Path) -> None:
    """A fresh LoRA (B = 0) is the base."""
    _, parts = build_run(student__kind="lora", tasks={"self": own_teacher(tiny_world)})
    report = parts.trainer.run_round(0)
    assert report.losses.loss == 0.0


def test_unequal_micro_batches_cost_only_rounding(build_run: Build, tiny_world: Path) -> None:
    _, parts = build_run(tasks={"self": own_teacher(tiny_world)}, scoring__micro_batch=3, train__micro_batch=7)
    assert parts.trainer.run_round(0).losses.loss < 1e-12


VARIANTS: dict[str, dict[str, Any]] = {
    "micro-batches of 3": {"train__micro_batch": 3, "rollout__micro_batch": 2, "scoring__micro_batch": 5},
    "one micro-batch": {"train__micro_batch": 64},
    "checkpointing": {"student__gradient_checkpointing": True},
    "fused": {"rollout__mode": "fused", "rollout__micro_batch": 3},
    "fused, each task alone": {"rollout__mode": "fused", "tasks__two__guidance": 2.0 + 1e-12},
    "offloaded teachers": {"tasks__one__teacher__placement": "offload", "tasks__two__teacher__placement": "offload"},
    "streamed teachers": {"tasks__one__teacher__placement": "stream", "tasks__two__teacher__placement": "stream"},
    "sharded teachers": {
        "tasks__one__teacher__placement": "zero_inference",
        "tasks__two__teacher__placement": "zero_inference",
    },
}


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_the_gradient_does_not_depend_on_how_the_round_is_cut(
    build_run: Build, sgd: Callable[[int], str], noise: float
) -> None:
    """Invariant 1 (the multi-rank part is in test_multirank): micro-batches, mode, placement, checkpointing, stage."""
    kernel = {"rollout__kernel": "flow" if noise else "euler", "rollout__noise_level": noise}
    kernel["rollout__trained_steps"] = {"queries": 3}
    _, parts = build_run(deepspeed=sgd(0), optimizer=SGD, **kernel)
    expected = gradients(parts)
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 0
    cases = {f"stage {stage}": {"deepspeed": sgd(stage)} for stage in (1, 2, 3)}
    cases |= {name: {"deepspeed": sgd(0), **changes} for name, changes in VARIANTS.items()}
    if not noise:  # of what does not look at the sampler's noise, once is enough
        cases = {name: cases[name] for name in ("stage 3", "micro-batches of 3", "fused")}
    for name, changes in cases.items():
        _, parts = build_run(optimizer=SGD, **kernel, **changes)
        found = gradients(parts)
        worst = max(float((found[key] - expected[key]).abs().max()) for key in expected)
        assert worst < 1e-5 * scale + 1e-7, f"{name}: gradients differ by {worst} at scale {scale}"


@pytest.mark.parametrize(("kind", "precision"), [("full", "bf16"), ("lora", "fp32")])
def test_weights_gathered_once_or_layer_by_layer_make_the_same_rounds(
    build_run: Build, kind: str, precision: str
) -> None:
    """Bit for bit, with velocities kept from the rollout; and all is sharded afterwards."""
    noisy = FEW | {"rollout__kernel": "flow", "rollout__noise_level": 0.7, "objective": {"method": "ppo"}}
    found = {}
    for gather in ("once", "per_layer", "auto"):
        _, parts = build_run(student__kind=kind, precision=precision, rollout__gather=gather, **noisy)
        losses = [parts.trainer.run_round(index).losses.loss for index in range(2)]
        sharded = [p.ds_status.name for p in parts.student.module.parameters() if not p.ds_persist]
        assert set(sharded) == {"NOT_AVAILABLE"}
        found[gather] = losses, parts.student.gather_weights(trainable_only=True)
    for losses, weights in found.values():
        assert losses == found["per_layer"][0]
        assert all(torch.equal(value, found["per_layer"][1][name]) for name, value in weights.items())


def test_weights_that_would_not_fit_are_gathered_layer_by_layer(
    build_run: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, parts = build_run()
    monkeypatch.setattr("opd_ds.engine.replica._free_bytes", lambda group: 1000)
    with caplog.at_level("INFO", logger="opd_ds"), parts.student.gathered() as network:
        assert network is parts.student
    assert "rollout.gather = auto: weights are gathered layer by layer" in caplog.text


def test_a_task_is_a_mean_and_another_task_rescales_nothing(build_run: Build, sgd: Callable[[int], str]) -> None:
    """Invariant 4: the round's gradient is the weighted sum of the tasks' own gradients."""
    both_config, both = build_run(deepspeed=sgd(0), optimizer=SGD, tasks__two__weight=0.5)
    tasks = both_config.model_dump(mode="json")["tasks"]
    together = gradients(both)
    alone = {
        name: gradients(build_run(deepspeed=sgd(0), optimizer=SGD, tasks={name: task})[1])
        for name, task in tasks.items()
    }
    for key, value in together.items():
        torch.testing.assert_close(value, alone["one"][key] + alone["two"][key], rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_paper_formula(build_run: Build, tiny_world: Path) -> None:
    """Mean over samples and steps of b^2/2 * mean((v_S - v_T)^2), computed here from the pieces, by hand."""
    from opd_ds.data import draw_prompts
    from opd_ds.diffusion.noise import SampleNoise, sample_seed

    config, parts = build_run(tasks={"one": {**own_teacher(tiny_world), "teacher": str(tiny_world / "other")}})
    family, steps = parts.family, config.rollout.steps
    student, teacher = family.load_transformer(), family.load_transformer(tiny_world / "other")
    prompts = (tiny_world / "prompts.txt").read_text().splitlines()
    drawn = [prompts[i] for i in draw_prompts(len(prompts), 4, 0, 0, "one")]
    cond, uncond, sigmas = family.encode(drawn), family.encode([""]), family.sigmas(steps)
    x = SampleNoise([sample_seed(0, 0, "one", i) for i in range(4)], family.latent_shape).draw(slice(None))
    expected = 0.0
    with torch.no_grad():
        for j in range(steps):
            sigma, dt = sigmas[j].float().expand(4), float(sigmas[j + 1] - sigmas[j])
            ours = family.guided_velocity(student, x, sigma, cond, uncond, 2.0)
            theirs = family.guided_velocity(teacher, x, sigma, cond, uncond, 4.5)
            expected += dt**2 / 2 * float((ours - theirs).square().mean()) / steps
            x = x + dt * ours
    report = parts.trainer.run_round(0)
    assert report.losses.loss == pytest.approx(expected, rel=1e-5)
    assert report.losses.means["one"]["kl"] == pytest.approx(expected, rel=1e-5)


def test_one_optimizer_step_a_round(build_run: Build) -> None:
    _, parts = build_run(train__micro_batch=1, **FEW)
    for index in range(3):
        parts.trainer.run_round(index)
    assert parts.student._engine.global_steps == 3
    _, parts = build_run(train__inner_epochs=2, **FEW)
    parts.trainer.run_round(0)
    assert parts.student._engine.global_steps == 2


@pytest.mark.parametrize("placement", ["resident", "offload"])
def test_teachers_and_a_lora_students_base_never_change(build_run: Build, placement: str) -> None:
    """Invariant 3: no gradient, no change, bit for bit."""
    changes = {f"tasks__{task}__teacher__placement": placement for task in ("one", "two")}
    _, parts = build_run(student__kind="lora", **FEW, **changes)
    networks = {task: parts.teachers._networks[task].module for task in ("one", "two")}
    frozen = {f"{task}.{name}": p for task, module in networks.items() for name, p in module.named_parameters()}
    frozen |= {name: p for name, p in parts.student.module.named_parameters() if "lora" not in name}
    before = {name: p.detach().clone() for name, p in frozen.items()}
    adapter = parts.student.gather_weights(trainable_only=True)
    for index in range(2):
        parts.trainer.run_round(index)
    for name, parameter in frozen.items():
        assert torch.equal(parameter, before[name]), name
        assert not parameter.requires_grad or "two" in name or parameter.grad is None
        assert parameter.grad is None
    assert any(not torch.equal(v, adapter[k]) for k, v in parts.student.gather_weights(trainable_only=True).items())


def test_guidances_are_separate_settings(build_run: Build, tiny_world: Path) -> None:
    """Invariant 6: the teacher without guidance against the student with it is not zero, even for one network."""
    _, parts = build_run(tasks={"self": own_teacher(tiny_world, guidance=1.0)}, **FEW)
    assert parts.trainer.run_round(0).losses.loss > 1e-6
    task = own_teacher(tiny_world, guidance=1.0) | {"guidance": 1.0}
    _, parts = build_run(tasks={"self": task}, **FEW)
    assert parts.trainer.run_round(0).losses.loss == 0.0


def test_training_lowers_the_loss(build_run: Build) -> None:
    _, parts = build_run(deepspeed="zero0", optimizer__lr=3e-3, rollout__samples=8)
    losses = [parts.trainer.run_round(index).losses.loss for index in range(20)]
    assert losses[-1] < 0.6 * losses[0]


def test_a_loss_that_is_not_finite_stops_before_the_step(build_run: Build) -> None:
    _, parts = build_run(deepspeed="zero0")
    name, parameter = next((n, p) for n, p in parts.student.module.named_parameters() if "proj_out.weight" in n)
    with torch.no_grad():
        parameter.fill_(float("nan"))
    steps = parts.student._engine.global_steps
    with pytest.raises(NonFiniteError, match=r"round 1: the loss is nan \(tasks one, two\)"):
        parts.trainer.run_round(0)
    assert parts.student._engine.global_steps == steps
    assert name


# ---- EMA ----


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ema_is_the_average_of_the_masters(build_run: Build, tmp_path: Path, stage: int, precision: str) -> None:
    """Against the definition, at every stage; swapped in, the network holds it, swapped out, nothing has changed."""
    settings = {"decay": 0.9, "warmup": True, "every": 2}
    _, parts = build_run(deepspeed=f"zero{stage}", precision=precision, student__ema=settings, **FEW)
    assert parts.ema is not None
    expected = [f.master.clone() for f in parts.student.fragments]
    for index in range(4):
        parts.trainer.run_round(index)
        if (index + 1) % 2 == 0:
            steps = index + 1
            decay = min(0.9, (1 + steps) / (10 + steps))
            masters = [f.master for f in parts.student.fragments]
            expected = [decay * e + (1 - decay) * m for e, m in zip(expected, masters, strict=True)]
    for shard, value in zip(parts.ema._shards, expected, strict=True):
        torch.testing.assert_close(shard, value, rtol=1e-5, atol=1e-7)
        assert shard.dtype == torch.float32
    before = parts.student.gather_weights(trainable_only=False)
    with parts.ema.swapped_in():
        inside = parts.student.gather_weights(trainable_only=False)
    after = parts.student.gather_weights(trainable_only=False)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(before[name], inside[name]) for name in before)
    total = sum(value.numel() for name, value in inside.items() if "pos_embed.pos_embed" not in name)
    flat = torch.cat([value.flatten() for value in expected])
    # Same numbers in another order (and padding at the end of a shard).
    mass = sum(float(v.double().square().sum()) for n, v in inside.items() if "pos_embed.pos_embed" not in n)
    assert mass == pytest.approx(float(flat.double().square().sum()), rel=1e-5 if precision == "fp32" else 1e-2)
    assert total <= flat.numel() <= total + 64


# ---- refused at start ----


def test_teachers_that_cannot_be_compared_are_refused(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    def attempt(teacher: Path, **more: Any) -> None:
        task = own_teacher(tiny_world, path=str(teacher), **more)
        prepare(DistilConfig.model_validate(run_settings(tiny_world, tmp_path / "out", tasks={"t": task})), group)

    foreign = write_lora(tiny_world / "base", tmp_path / "foreign", base_name="someone/another-model")
    with pytest.raises(UserError, match=r"tasks\.t\.teacher\.path.*'someone/another-model'.*trust_base=true"):
        attempt(foreign)
    attempt(foreign, trust_base=True)

    shifted = write_pipeline(tmp_path / "shifted", seed=9)
    file = shifted / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": 1.0}))
    with pytest.raises(UserError, match=r"scheduler_config\.json has shift = 1\.0, the student has 3\.0"):
        attempt(shifted)

    file = shifted / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 16}))
    with pytest.raises(UserError, match=r"in_channels = 16, the student has 4"):
        attempt(shifted)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a LoRA nor a checkpoint"):
        attempt(tmp_path / "empty")
    with pytest.raises(UserError, match=r"tasks\.t\.teacher\.path = '.*nowhere': no such file"):
        attempt(tmp_path / "nowhere")


def test_an_adapter_without_lora_b_is_refused(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    """PEFT would fill in zeros, and the teacher would silently be the base."""
    from safetensors.torch import load_file, save_file

    folder = write_lora(tiny_world / "base", tmp_path / "half")
    weights = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(weights).items() if "lora_B" not in key}, weights)
    config = run_settings(tiny_world, tmp_path / "out", tasks={"t": own_teacher(tiny_world, path=str(folder))})
    with pytest.raises(UserError, match=r"half a LoRA, the first: .* has no lora_B"):
        prepare(DistilConfig.model_validate(config), group)
