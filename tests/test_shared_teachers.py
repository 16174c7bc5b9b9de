"""LoRA teachers as further adapters in the LoRA student's network: the same numbers, and nobody else sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from opd_ds.checkpoint.export_student import STUDENT_ADAPTER
from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.schema import RunConfig
from opd_ds.config.teachers import TeacherSection
from opd_ds.errors import UserError
from opd_ds.models import lora
from opd_ds.plan.devices import parse_devices
from opd_ds.plan.memory import run_memory
from opd_ds.runs.files import find_files
from opd_ds.runs.setup import Parts
from tests.ranks import TRAIN_MANY, launch
from tests.runs import metrics
from tests.tiny import ALL_SHARDED, costs_of, run_settings, write_config

Build = Callable[..., tuple[RunConfig, Parts]]


@pytest.fixture(scope="module")
def wide(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with other targets than the student's, ranks by module, and rank-stabilised scaling."""
    folder = tmp_path_factory.mktemp("wide")
    fields: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["attn.to_q", "ff.net.2", "proj_out"],
        "rank_pattern": {"ff.net.2": 2},
        "alpha_pattern": {"attn.to_q": 7},
        "use_rslora": True,
    }
    torch.manual_seed(3)
    network = SD3Transformer2DModel.from_pretrained(tiny_world / "base", subfolder="transformer")
    lora.new_adapter(network, "x", LoraConfig(**fields))
    state = {
        f"base_model.model.{key}": torch.randn_like(value) * 0.2
        for key, value in lora.adapter_parameters(network, "x").items()
    }
    save_file(state, folder / lora.PEFT_WEIGHTS)
    (folder / lora.PEFT_CONFIG).write_text(json.dumps(fields | {"peft_type": "LORA"}))
    return folder


def settings(world: Path, wide: Path, placement: str = "auto", **changes: Any) -> dict[str, Any]:
    """A LoRA student; three LoRA teachers, the base as a fourth, and an anchor."""

    def teacher(path: Path, guidance: float) -> dict[str, Any]:
        return {"path": str(path), "guidance": guidance, "placement": placement}

    prompts = str(world / "prompts.txt")
    paths = {"one": world / "adapter", "two": world / "adapter2", "three": wide, "four": world / "base"}
    tasks = {name: {"teacher": teacher(path, 1.5), "prompts": prompts} for name, path in paths.items()}
    return {
        "student__kind": "lora",
        "student__gradient_checkpointing": True,
        "precision": "bf16",
        "rollout__samples": 2,
        "rollout__steps": 2,
        "tasks": tasks,
        "anchor": teacher(world / "adapter", 1.0) | {"weight": 0.1},
        **changes,
    }


def outcome(parts: Parts) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and norms of two rounds, and the student after them."""
    reports = [parts.trainer.run_round(index) for index in range(2)]
    numbers = [number for report in reports for number in (report.losses.loss, report.grad_norm)]
    return numbers, parts.student.gather_weights(trainable_only=True)


@pytest.mark.parametrize(
    "cut",
    [
        {"deepspeed": "zero0", "precision": "fp32"},
        {"deepspeed": "zero2", "rollout__mode": "fused"},
        {"deepspeed": ALL_SHARDED, "rollout__gather": "once"},
        {"deepspeed": ALL_SHARDED, "rollout__gather": "per_layer"},
        {"deepspeed": ALL_SHARDED, "rollout__mode": "fused"},
    ],
    ids=["stage 0", "stage 2, fused", "stage 3, gathered", "stage 3, per layer", "stage 3, fused"],
)
def test_teachers_in_the_students_network_teach_what_separate_ones_teach(
    build_run: Build, tiny_world: Path, wide: Path, cut: dict[str, Any]
) -> None:
    """Bit for bit; the gradient is the student's alone, and neither teachers nor base change."""
    expected, weights = outcome(build_run(**settings(tiny_world, wide, "resident", **cut))[1])
    _, parts = build_run(**settings(tiny_world, wide, **cut))
    frozen = {name: p for name, p in parts.student.module.named_parameters() if not p.requires_grad}
    assert sum(".lora_A.teacher_" in name for name in frozen) > 0
    before = parts.student.gather_weights(trainable_only=False)
    found, others = outcome(parts)
    assert found == expected
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    after = parts.student.gather_weights(trainable_only=False)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert all(p.grad is None for p in frozen.values())


def test_only_the_students_adapter_is_seen(build_run: Build, tiny_world: Path, wide: Path) -> None:
    """In checkpoints, averages and exports; a run may go on with its teachers in another place."""
    _, separate = build_run(**settings(tiny_world, wide, "resident"))
    _, shared = build_run(**settings(tiny_world, wide))
    assert shared.student.shapes == separate.student.shapes
    assert shared.student.state_dict().keys() == separate.student.state_dict().keys()
    assert shared.identity == separate.identity
    assert shared.ema is not None
    assert all(f".{STUDENT_ADAPTER}." in key for key in shared.ema.state_dict())
    exported = lora.strip_adapter_name(shared.student.gather_weights(trainable_only=True))
    assert exported.keys() == lora.strip_adapter_name(separate.student.gather_weights(trainable_only=True)).keys()
    assert lora.config_fields(shared.student.module, STUDENT_ADAPTER) == lora.config_fields(
        separate.student.module, STUDENT_ADAPTER
    )


@pytest.mark.parametrize("deepspeed", ["zero2", ALL_SHARDED])
def test_a_student_that_starts_as_its_teacher_has_loss_zero(build_run: Build, tiny_world: Path, deepspeed: str) -> None:
    """Exactly, with two adapters of one network."""
    teacher = {"path": str(tiny_world / "adapter"), "guidance": 2.0}
    _, parts = build_run(
        student__kind="lora",
        student__start=str(tiny_world / "adapter"),
        precision="bf16",
        deepspeed=deepspeed,
        tasks={"self": {"teacher": teacher, "prompts": str(tiny_world / "prompts.txt")}},
    )
    report = parts.trainer.run_round(0)
    assert (report.losses.loss, report.grad_norm) == (0.0, 0.0)


def test_the_students_adapter_is_back_after_a_teacher_that_fails(
    build_run: Build, tiny_world: Path, wide: Path
) -> None:
    _, parts = build_run(**settings(tiny_world, wide, deepspeed="zero0"))
    layer = next(module for module in parts.student.module.modules() if isinstance(module, BaseTunerLayer))

    def fail() -> None:
        with parts.teachers.active("one"):
            assert layer.active_adapters[0].startswith("teacher_")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert layer.active_adapters == [STUDENT_ADAPTER]


def test_replica_is_gathered_once_for_rollout_and_teachers(
    build_run: Build, tiny_world: Path, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opd_ds.engine.replica import UnshardedReplica

    gathers, materialized = [], UnshardedReplica.materialized
    monkeypatch.setattr(
        UnshardedReplica, "materialized", lambda self, module: (gathers.append(1), materialized(self, module))[1]
    )
    _, parts = build_run(**settings(tiny_world, wide, rollout__gather="once"))
    parts.trainer.run_round(0)
    assert len(gathers) == 1


@pytest.mark.parametrize(
    ("placement", "student", "what", "expected"),
    [
        ("auto", "lora", "lora", "shared"),
        ("auto", "lora", "base", "shared"),
        ("auto", "lora", "full", "resident"),
        ("auto", "full", "lora", "resident"),
        ("auto", "full", "base", "resident"),
        ("offload", "lora", "lora", "offload"),
        ("resident", "lora", "base", "resident"),
        ("shared", "lora", "lora", "shared"),
    ],
)
def test_where_a_teacher_stands(placement: str, student: str, what: str, expected: str) -> None:
    section = TeacherSection(path="x", placement=placement)  # type: ignore[arg-type]
    placed = section.placed("tasks.a.teacher", student, is_lora=what == "lora", is_base=what == "base")
    assert placed.placement == expected


def test_what_cannot_be_shared_is_refused(build_run: Build, tiny_world: Path, wide: Path) -> None:
    section = TeacherSection(path="x", placement="shared")
    with pytest.raises(UserError, match=r"tasks\.a\.teacher\.placement = 'shared'.*another full checkpoint"):
        section.placed("tasks.a.teacher", "lora", is_lora=False)
    with pytest.raises(UserError, match=r"student\.kind = 'full'"):
        section.placed("tasks.a.teacher", "full", is_lora=True)


def test_the_base_in_the_students_network_takes_no_memory(tiny_world: Path, tmp_path: Path) -> None:
    """The plan knows it by its path, however that is written."""
    (tmp_path / "link").symlink_to(tiny_world / "base")
    for path in (tiny_world / "base", tmp_path / "link"):
        task = {"teacher": str(path), "prompts": str(tiny_world / "prompts.txt")}
        for kind in ("lora", "full"):
            data = run_settings(tiny_world, tmp_path, student__kind=kind, tasks={"a": task})
            config = DistilConfig.model_validate(data)
            memory = run_memory(config, costs_of(config), parse_devices("1xA100-40GB", "--gpus"))
            assert any(part.name == "teachers" for part in memory.device) == (kind == "full")


def test_batches_found_by_each_rank_are_refused_where_forwards_are_collective(
    tiny_world: Path, wide: Path, tmp_path: Path
) -> None:
    def find(ranks: int, **changes: Any) -> None:
        data = run_settings(tiny_world, tmp_path, **settings(tiny_world, wide, scoring__micro_batch="auto", **changes))
        find_files(DistilConfig.model_validate(data), World(size=ranks, local_size=ranks))

    swapped = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}}
    nvme = tmp_path / "nvme.json"
    nvme.write_text(json.dumps(swapped | {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}))
    refusal = r"scoring\.micro_batch = 'auto' .* rollout\.gather = "
    with pytest.raises(UserError, match=refusal + "'per_layer'"):
        find(2, rollout__gather="per_layer")
    with pytest.raises(UserError, match=refusal + "'once'"):  # parameters on NVMe are gathered per layer all the same
        find(2, rollout__gather="once", deepspeed=str(nvme))
    find(2, rollout__gather="once")
    find(1, rollout__gather="per_layer")


@pytest.mark.extended
@pytest.mark.multirank
def test_two_ranks_train_the_same_with_shared_and_separate_teachers(
    tiny_world: Path, wide: Path, tmp_path: Path
) -> None:
    """Bit for bit at every cut; forwards of shared teachers are collective where weights are gathered per layer."""
    cuts: dict[str, dict[str, Any]] = {
        "per layer": {"deepspeed": ALL_SHARDED, "rollout__gather": "per_layer"},
        "fused": {"deepspeed": ALL_SHARDED, "rollout__mode": "fused", "rollout__samples": 3},
    }
    placed = {f"{cut}, {where}": {**cuts[cut], "placement": where} for cut in cuts for where in ("shared", "resident")}
    files = []
    for number, (name, changes) in enumerate(placed.items()):
        data = run_settings(tiny_world, tmp_path / name, **settings(tiny_world, wide, run__rounds=2, **changes))
        files.append(write_config(tmp_path / f"{number}.yaml", data))
    launch(2, *map(str, files), script=TRAIN_MANY)
    found = {name: metrics(tmp_path / name) for name in placed}
    for cut in cuts:
        assert found[f"{cut}, shared"] == found[f"{cut}, resident"], cut
    assert all(row["loss"] > 0 for row in found["fused, shared"])
