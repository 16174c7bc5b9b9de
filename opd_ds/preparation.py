"""From a run config to a Trainer: find all files, check everything that can be checked, then load networks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from opd_ds.config import RewardSection, RunConfig, StudentSection
from opd_ds.engine import Group, ShardedEma, StudentEngine, frozen_ds_config, read_ds_config, student_ds_config
from opd_ds.errors import UserError
from opd_ds.evaluation.benchmark import Benchmark, EvaluationSet
from opd_ds.evaluation.evaluator import Evaluator
from opd_ds.evaluation.pictures import Painter
from opd_ds.export import STUDENT_ADAPTER
from opd_ds.hashing import weights_sha256
from opd_ds.launch import World
from opd_ds.loading import resolve_ds_config, resolve_path
from opd_ds.models import ModelFamily, build_family, lora
from opd_ds.prompts import PromptSet
from opd_ds.rewards import Reward, build, check
from opd_ds.teachers import TeacherPool, TeacherSpec, check_teacher
from opd_ds.trainer import Trainer

EVALUATION_FOLDER = "eval"
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
    benchmark: Benchmark
    rewards: dict[str, Reward]
    identity: dict[str, Any]


def find_files(config: RunConfig, world: World) -> RunFiles:
    """Resolve and check every file the config names; loads no network.

    Raises:
        UserError: the first thing that is missing or contradictory.
    """
    ds_path = resolve_ds_config(config.deepspeed, "deepspeed")
    ds_config = student_ds_config(read_ds_config(ds_path), config, world, str(ds_path))
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
            teacher_ds = frozen_ds_config(read_ds_config(path), config.precision, world.size, str(path))
        found = resolve_path(task.teacher.path, f"tasks.{name}.teacher.path")
        teachers[name] = TeacherSpec(task.teacher, found, teacher_ds)
    return RunFiles(model, teachers, prompts, eval_prompts, ds_config)


def prepare(config: RunConfig, group: Group) -> Parts:
    """Build the run. Collective.

    Raises:
        UserError: on every rank, with the message of the first rank that failed.
    """
    with group.agreed():
        files = find_files(config, group.world)
        family = load_family(config, files.model, group.device)
        for name, spec in files.teachers.items():
            check_teacher(family, name, spec, config.model.path)
        identity = run_identity(config, files) if group.world.is_main else None
    with group.agreed():
        module = student_module(config.student, config.run.seed, family)
        if group.device.type == "cuda":
            module.to(group.device)
    student = StudentEngine(module, files.student_ds_config, group)
    ema = ShardedEma(student, config.student.ema) if config.student.ema.decay > 0 else None
    teachers = TeacherPool(family, files.teachers, group.device)
    trainer = Trainer(config, group, family, student, ema, teachers, files.prompts)
    rewards = build_rewards(config.rewards, group.device)
    painter = Painter(config, family, group)
    evaluator = Evaluator(config, group, painter, files.eval_prompts, rewards)
    identity = group.gather(identity)[0]
    sets = {
        name: EvaluationSet.of(prompts, own, own, config.evaluation.samples_per_prompt)
        for name, prompts in files.eval_prompts.items()
        for own in [tuple(reward.label for reward in config.tasks[name].rewards)]
    }
    folder = config.run.output_dir / EVALUATION_FOLDER
    benchmark = Benchmark(folder, group, painter, identity["base"]["sha256"], sets, rewards)
    return Parts(family, student, ema, teachers, trainer, evaluator, benchmark, rewards, identity)


def build_rewards(chosen: dict[str, RewardSection], device: torch.device) -> dict[str, Reward]:
    """By label, on the run's device where their options name no other."""
    return {label: build(reward.name, **{"device": str(device)} | reward.options) for label, reward in chosen.items()}


def load_family(config: RunConfig, path: Path, device: torch.device) -> ModelFamily:
    """The run's model family around the folder at `path`; raises UserError when it is none."""
    settings = config.model
    return build_family(
        settings.family,
        path,
        dtype=DTYPES[config.precision],
        device=device,
        height=settings.height,
        width=settings.width,
        max_text_length=settings.max_text_length,
        text_encoders=settings.text_encoders,
    )


def student_module(settings: StudentSection, seed: int, family: ModelFamily) -> nn.Module:
    """The student's network as it is before the first round, on the CPU."""
    module = family.load_transformer()
    if settings.gradient_checkpointing:
        module.enable_gradient_checkpointing()  # type: ignore[operator]
    if settings.kind == "lora":
        torch.manual_seed(seed)  # the same start on every rank
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
            "teacher_sha256": weights_sha256(files.teachers[name].path),
            "teacher_guidance": task.teacher.guidance,
            "prompts_sha256": files.prompts[name].sha256,
            "weight": task.weight,
            "guidance": task.guidance,
        }
        for name, task in config.tasks.items()
    }
    kept = {key: data[key] for key in ("precision", "student", "optimizer", "rollout", "objective")}
    # What the DeepSpeed JSON may set beside the run config. Which of the Adams computes it is a matter of placement.
    ds_config = copy.deepcopy(files.student_ds_config)
    ds_config["optimizer"]["params"].pop("torch_adam", None)
    kept["ds_config"] = {key: ds_config.get(key) for key in ("optimizer", "scheduler", "gradient_clipping")}
    base = {"sha256": weights_sha256(files.model), "negative_prompt": config.model.negative_prompt}
    return {"seed": config.run.seed, "inner_epochs": config.train.inner_epochs, "base": base, "tasks": tasks, **kept}
