"""From a run config to a Trainer: find all files, check everything that can be checked, then load networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from opd_ds.config import RunConfig
from opd_ds.engine import Group, ShardedEma, StudentEngine, frozen_ds_config, read_ds_config, student_ds_config
from opd_ds.errors import UserError
from opd_ds.evaluation import Evaluator
from opd_ds.export import STUDENT_ADAPTER
from opd_ds.hashing import file_sha256
from opd_ds.loading import resolve_ds_config, resolve_path
from opd_ds.models import ModelFamily, build_family, lora
from opd_ds.prompts import PromptSet
from opd_ds.rewards import build, check
from opd_ds.teachers import TeacherPool, TeacherSpec, check_teacher
from opd_ds.trainer import Trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RunFiles:
    """Everything a run reads, found and checked."""

    model: Path
    teachers: dict[str, TeacherSpec]
    prompts: dict[str, PromptSet]
    eval_prompts: dict[str, PromptSet]
    student_ds_config: dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """A run, ready to start. `identity` is what a checkpoint must share with the run that resumes it."""

    family: ModelFamily
    student: StudentEngine
    ema: ShardedEma | None
    teachers: TeacherPool
    trainer: Trainer
    evaluator: Evaluator
    identity: dict[str, Any]


def find_files(config: RunConfig, world_size: int) -> RunFiles:
    """Resolve and check every file the config names; loads no network.

    Raises:
        UserError: the first thing that is missing or contradictory.
    """
    ds_path = resolve_ds_config(config.deepspeed, "deepspeed")
    ds_config = student_ds_config(read_ds_config(ds_path), config, world_size, str(ds_path))
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer", {})
    if offload.get("device") == "nvme" and config.student.ema.decay > 0:
        raise UserError(
            f"deepspeed = {config.deepspeed!r} keeps the master weights on NVMe, where an EMA cannot follow them; "
            "set student.ema.decay = 0 or offload the optimizer to cpu"
        )
    for name, task in config.tasks.items():
        for reward in task.rewards:
            check(reward.name, f"tasks.{name}.rewards", reward.options)
    prompts = {n: PromptSet.read(resolve_path(t.prompts, f"tasks.{n}.prompts")) for n, t in config.tasks.items()}
    eval_prompts = {
        name: PromptSet.read(resolve_path(task.eval_prompts, f"tasks.{name}.eval_prompts"))
        for name, task in config.tasks.items()
        if task.eval_prompts is not None
    }
    model = resolve_path(config.model.path, "model.path")
    teachers = {}
    for name, task in config.tasks.items():
        teacher_ds = None
        if task.teacher.placement == "zero_inference":
            value = task.teacher.deepspeed or "zero_inference_gpu"
            path = resolve_ds_config(value, f"tasks.{name}.teacher.deepspeed")
            teacher_ds = frozen_ds_config(read_ds_config(path), config.precision, world_size, str(path))
        found = resolve_path(task.teacher.path, f"tasks.{name}.teacher.path")
        teachers[name] = TeacherSpec(task.teacher, found, teacher_ds)
    return RunFiles(model, teachers, prompts, eval_prompts, ds_config)


def prepare(config: RunConfig, group: Group) -> Parts:
    """Build the run. Collective.

    Raises:
        UserError: on every rank, with the message of the first rank that failed.
    """
    with group.agreed():
        files = find_files(config, group.world.size)
        family = build_family(
            config.model.family,
            files.model,
            dtype=DTYPES[config.precision],
            device=group.device,
            height=config.model.height,
            width=config.model.width,
            max_text_length=config.model.max_text_length,
            text_encoders=config.model.text_encoders,
        )
        for name, spec in files.teachers.items():
            check_teacher(family, name, spec, config.model.path)
        identity = run_identity(config, files) if group.world.is_main else None
    with group.agreed():
        module = _student_module(config, family)
        if group.device.type == "cuda":
            module.to(group.device)
    student = StudentEngine(module, files.student_ds_config, group)
    ema = ShardedEma(student, config.student.ema) if config.student.ema.decay > 0 else None
    teachers = TeacherPool(family, files.teachers, group.device)
    trainer = Trainer(config, group, family, student, ema, teachers, files.prompts)
    rewards = {label: build(reward.name, **reward.options) for label, reward in config.rewards.items()}
    evaluator = Evaluator(config, group, family, files.eval_prompts, rewards)
    return Parts(family, student, ema, teachers, trainer, evaluator, group.gather(identity)[0])


def _student_module(config: RunConfig, family: ModelFamily) -> nn.Module:
    module = family.load_transformer()
    settings = config.student
    if settings.gradient_checkpointing:
        module.enable_gradient_checkpointing()  # type: ignore[operator]
    if settings.kind == "lora":
        torch.manual_seed(config.run.seed)  # the same start on every rank
        lora_config = LoraConfig(
            r=settings.lora.rank,
            lora_alpha=settings.lora.alpha,
            target_modules=list(settings.lora.targets),
            init_lora_weights="gaussian",
        )
        lora.new_adapter(module, STUDENT_ADAPTER, lora_config)
    return module.train()


def run_identity(config: RunConfig, files: RunFiles) -> dict[str, Any]:
    """What decides a run's numbers: settings, and hashes of base, teachers and prompts. Speed settings are left out."""
    data = config.model_dump(mode="json")
    for section, keys in {"rollout": ("micro_batch", "mode"), "student": ("gradient_checkpointing",)}.items():
        for key in keys:
            data[section].pop(key)
    tasks = {
        name: {
            "teacher_sha256": file_sha256(files.teachers[name].path),
            "teacher_guidance": task.teacher.guidance,
            "prompts_sha256": files.prompts[name].sha256,
            "weight": task.weight,
            "guidance": task.guidance,
        }
        for name, task in config.tasks.items()
    }
    kept = {key: data[key] for key in ("precision", "student", "optimizer", "rollout", "objective")}
    base = {"sha256": file_sha256(files.model), "negative_prompt": config.model.negative_prompt}
    return {"seed": config.run.seed, "inner_epochs": config.train.inner_epochs, "base": base, "tasks": tasks, **kept}
