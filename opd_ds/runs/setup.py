"""From a run config to a Trainer: find all files, check everything that can be checked, then load networks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from opd_ds.cluster.world import World
from opd_ds.config.paths import resolve_ds_config, resolve_path
from opd_ds.config.rl import LearnedSection, WeightedReward
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import ANCHOR, AnchorSection, RewardSection, TeacherSection
from opd_ds.data import PromptSet
from opd_ds.data.text_cache import TextCache, encoders_identity
from opd_ds.engine import (
    Group,
    NodeMemory,
    ShardedEma,
    StudentEngine,
    frozen_ds_config,
    parameter_builder,
    parameters_on_nvme,
    read_ds_config,
    student_ds_config,
    swapped_apart,
    zero_stage,
)
from opd_ds.errors import UserError, about
from opd_ds.evaluation.benchmark import Benchmark, EvaluationSet
from opd_ds.evaluation.evaluator import Evaluator
from opd_ds.evaluation.pictures import Painter
from opd_ds.evaluation.reward_pool import RewardPool
from opd_ds.models import ModelFamily, compile_blocks, family_class, lora
from opd_ds.rewards import Reward, build, check
from opd_ds.runs.trackers import check_trackers
from opd_ds.training.networks import load_family, student_module
from opd_ds.training.teachers import TeacherPool, TeacherSpec, check_weights, load_shared
from opd_ds.training.trainer import Components, Trainer
from opd_ds.utils.hashing import all_weights_sha256

EVALUATION_FOLDER = "eval"


@dataclass(frozen=True)
class RunFiles:
    """Everything a run reads, found and checked."""

    model: Path
    start: Path | None
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
    rewards: RewardPool
    identity: dict[str, Any]


def find_files(config: RunConfig, world: World) -> RunFiles:
    """Resolve and check every file the config names; loads no network.

    Raises:
        UserError: the first thing that is missing or contradictory.
    """
    ds_path = resolve_ds_config(config.deepspeed, "deepspeed")
    ds_config = swapped_apart(student_ds_config(read_ds_config(ds_path), config, world, str(ds_path)), "student")
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer", {})
    if offload.get("device") == "nvme" and config.weight_snapshots:
        raise UserError(
            f"deepspeed = {config.deepspeed!r} keeps the master weights on NVMe, where no average or earlier policy "
            "can follow them; offload the optimizer to cpu (or keep none: student.ema.decay = 0 and, with "
            "teach.algorithm = 'guard', teach.kl = 0)"
        )
    for name, section in config.evaluated.items():
        for reward in section.rewards:
            check(reward.name, f"{config.place(name)}.rewards", reward.options)
    prompts, eval_prompts = find_prompts(config)
    if world.is_main:
        check_trackers(config.trackers)
        _say_oddities(config, prompts, eval_prompts)
    model = resolve_path(config.model.path, "model.path")
    if world.is_main:
        texts = [found.prompts for found in (*prompts.values(), *eval_prompts.values())]
        check_text_cache(config, model, all_prompts(config, texts))
    start = resolve_path(config.student.start, "student.start") if config.student.start else None
    teachers = {
        name: _find_teacher(config, config.teacher_key(name), teacher, world)
        for name, teacher in config.all_teachers.items()
    }
    if world.size > 1:
        _refuse_uneven_forwards(config, teachers, ds_config)
    return RunFiles(model, start, teachers, prompts, eval_prompts, ds_config)


def find_prompts(config: RunConfig) -> tuple[dict[str, PromptSet], dict[str, PromptSet]]:
    """Training prompts by task; held-out prompts by task or probe.

    Raises:
        UserError: as `PromptSet.read`.
    """
    prompts = {name: PromptSet.read(task.prompts, f"tasks.{name}.prompts") for name, task in config.tasks.items()}
    eval_prompts = {
        name: PromptSet.read(section.eval_prompts, f"{config.place(name)}.eval_prompts")
        for name, section in config.evaluated.items()
        if section.eval_prompts is not None
    }
    return prompts, eval_prompts


def all_prompts(config: RunConfig, sets: Iterable[Sequence[str]]) -> list[str]:
    """What a run encodes, each text once: the negative prompt and all sets."""
    return list(dict.fromkeys([config.model.negative_prompt, *(prompt for one in sets for prompt in one)]))


def check_text_cache(config: RunConfig, model: Path, prompts: list[str]) -> None:
    """Raise UserError when a run would read encoded prompts that are not there, or not of its text encoders."""
    if config.model.text_encoders == "cached":
        TextCache(config.text_cache).check(encoders_identity(config, model), prompts)


def _say_oddities(config: RunConfig, prompts: dict[str, PromptSet], eval_prompts: dict[str, PromptSet]) -> None:
    length = config.model.max_text_length or family_class(config.model.family).default_text_length
    sets = {f"tasks.{name}.prompts": found for name, found in prompts.items()}
    sets |= {f"{config.place(name)}.eval_prompts": found for name, found in eval_prompts.items()}
    for key, found in sets.items():
        if found.repeats:
            logging.getLogger("opd_ds").warning(
                "%s: %d of %d prompts stand further up already and are drawn as often as they stand there; "
                "`unique: true` keeps the first of each",
                key, found.repeats, len(found),
            )  # fmt: skip
        if cut := sum(len(prompt.split()) > length for prompt in found.prompts):
            logging.getLogger("opd_ds").warning(
                "%s: %d of %d prompts have more words than the text encoder takes tokens, %d (model.max_text_length); "
                "their ends are cut off",
                key, cut, len(found), length,
            )  # fmt: skip


def _find_teacher(config: RunConfig, key: str, teacher: TeacherSection, world: World) -> TeacherSpec:
    ds_config = None
    place = resolve_path(teacher.path, f"{key}.path")
    with about(f"{key}.path = {teacher.path!r}"):
        is_lora = lora.is_adapter(place)
    teacher = teacher.placed(key, config.student.kind, is_lora=is_lora)
    if teacher.placement == "zero_inference":
        path = resolve_ds_config(teacher.deepspeed or "zero_inference_gpu", f"{key}.deepspeed")
        completed = frozen_ds_config(read_ds_config(path), config.precision, world.size, str(path))
        ds_config = swapped_apart(completed, key)
    return TeacherSpec(teacher, place, ds_config)


def _refuse_uneven_forwards(config: RunConfig, teachers: dict[str, TeacherSpec], ds_config: dict[str, Any]) -> None:
    """Each rank finds its own `scoring.micro_batch: auto`, and layers that are gathered one by one need all ranks."""
    whole = config.rollout.gather == "once" and not parameters_on_nvme(ds_config)
    if config.scoring.micro_batch != "auto" or zero_stage(ds_config) < 3 or whole:
        return
    if any(spec.settings.placement == "shared" for spec in teachers.values()):
        raise UserError(
            "scoring.micro_batch = 'auto' may come out differently on each rank, but with rollout.gather = "
            f"{config.rollout.gather!r} under ZeRO-3 the forwards of teachers with placement = 'shared' may be "
            "collective; give a number, or rollout.gather = 'once', or another placement"
        )


def prepare(config: RunConfig, group: Group) -> Parts:
    """Build the run. Collective.

    Raises:
        UserError: on every rank, with the message of the first rank that failed.
    """
    memory = NodeMemory(group)
    with group.raise_on_any_rank():
        files = find_files(config, group.world)
        family = load_family(config, files.model, group.device)
        family.host_memory = memory
        _check_weights(config, files, family)
        identity = run_identity(config, files, family) if group.world.is_main else None
    parameters = parameter_builder(files.student_ds_config, group.device, family.empty_transformer)
    with group.raise_on_any_rank():
        module = student_module(config.student, config.run.seed, family, files.start, parameters)
        load_shared(module, files.teachers.values(), family)
        if config.model.compile_blocks:
            compile_blocks(module)
    student = StudentEngine(module, files.student_ds_config, group, config.rollout.gather)
    ema = ShardedEma(student, config.student.ema) if config.student.ema.decay > 0 else None
    teachers = TeacherPool(
        family, files.teachers, group.device, student=student, memory=memory, compiled=config.model.compile_blocks
    )
    with group.raise_on_any_rank():
        rewards = build_rewards(config.rewards, group.device)
    pool = RewardPool(rewards, family.decode, group.device)
    trainer = build_trainer(Components(config, group, family, student, ema, files.prompts, teachers, pool))
    painter = Painter(config, family, group)
    evaluator = Evaluator(config, group, painter, files.eval_prompts, rewards)
    identity = group.broadcast(identity)
    for name, task in config.tasks.items():
        if isinstance(task, LearnedSection):
            identity["tasks"][name]["rewards"] = [_reward_identity(r, rewards[r.label]) for r in task.rewards]
    sets = {
        name: EvaluationSet.of(prompts, own, own, config.evaluation.samples_per_prompt, section.summed)
        for name, prompts in files.eval_prompts.items()
        for section in [config.evaluated[name]]
        for own in [tuple(reward.label for reward in section.rewards)]
    }
    folder = config.run.output_dir / EVALUATION_FOLDER
    benchmark = Benchmark(folder, group, painter, identity["base"]["sha256"], sets, rewards)
    return Parts(family, student, ema, teachers, trainer, evaluator, benchmark, pool, identity)


def build_trainer(parts: Components) -> Trainer:
    """What runs the rounds, as the config's algorithm names it."""
    module, name = parts.config.trainer.split(":")
    trainer: Trainer = getattr(import_module(module), name)(parts)
    return trainer


def build_rewards(chosen: dict[str, RewardSection], device: torch.device) -> dict[str, Reward]:
    """By label, on the run's device where their options name no other."""
    return {label: build(reward.name, **{"device": str(device)} | reward.options) for label, reward in chosen.items()}


def _check_weights(config: RunConfig, files: RunFiles, family: ModelFamily) -> None:
    family.check_guidance("rollout.guidance", config.rollout.guidance)
    for name, section in config.evaluated.items():
        if section.guidance is not None:
            family.check_guidance(f"{config.place(name)}.guidance", section.guidance)
    for name, spec in files.teachers.items():
        key, settings = config.teacher_key(name), spec.settings
        family.check_guidance(f"{key}.guidance", settings.guidance)
        base, trusted = config.model.path, settings.trust_base
        check_weights(family, f"{key}.path", settings.path, spec.path, base, trust_base=trusted)
    if files.start is None:
        return
    value, chosen = str(config.student.start), config.student
    check_weights(family, "student.start", value, files.start, config.model.path, trust_base=True)
    if chosen.kind != "lora":
        if not lora.is_adapter(files.start):
            with about(f"student.start = {value!r}"):
                family.check_same_weights(files.start)  # the export has the base's configuration
        return
    if not lora.is_adapter(files.start):
        raise UserError(
            f"student.start = {value!r} is a full checkpoint and student.kind = 'lora'; set model.path to it instead, "
            "or student.kind to 'full'"
        )
    theirs = lora.read_adapter(files.start, family.pipeline_class)[0]
    if theirs.r != chosen.lora.rank:
        raise UserError(
            f"student.start = {value!r} has rank {theirs.r}, student.lora.rank is {chosen.lora.rank}; set it to the "
            "former"
        )


def run_identity(config: RunConfig, files: RunFiles, family: ModelFamily) -> dict[str, Any]:
    """What decides a run's numbers: settings, and hashes of all weights and prompts. Speed settings are left out."""
    kept = config.resume_settings()
    start = [] if files.start is None else [files.start]
    sha256 = all_weights_sha256([files.model, *start, *(spec.path for spec in files.teachers.values())])
    if files.start is not None:
        kept["student"]["start"] = sha256[files.start]

    def teacher(name: str) -> dict[str, Any]:
        spec = files.teachers[name]
        return {"teacher_sha256": sha256[spec.path], "teacher_guidance": spec.settings.guidance}

    tasks: dict[str, dict[str, Any]] = {
        name: {"prompts_sha256": files.prompts[name].sha256, "weight": task.weight, "guidance": task.guidance}
        for name, task in config.tasks.items()
    }
    for name in config.teachers:
        tasks[name] |= teacher(name)
    for name, task in config.tasks.items():
        if isinstance(task, LearnedSection):
            tasks[name]["turns"] = task.turns
    anchor = config.all_teachers.get(ANCHOR)
    if isinstance(anchor, AnchorSection):
        kept["anchor"] = {"weight": anchor.weight, **teacher(ANCHOR)}
    # What the DeepSpeed JSON may set beside the run config. Which of the Adams computes it is a matter of placement.
    ds_config = copy.deepcopy(files.student_ds_config)
    ds_config["optimizer"]["params"].pop("torch_adam", None)
    kept["ds_config"] = {key: ds_config.get(key) for key in ("optimizer", "scheduler", "gradient_clipping")}
    base = {
        "sha256": sha256[files.model],
        "negative_prompt": config.model.negative_prompt,
        "latent_shape": list(family.latent_shape),
        "max_text_length": family.max_text_length,
    }
    return {"seed": config.run.seed, "inner_epochs": config.train.inner_epochs, "base": base, "tasks": tasks, **kept}


def _reward_identity(section: WeightedReward, reward: Reward) -> dict[str, Any]:
    """What decides its numbers; not where it is served, which may change from one start to the next."""
    what = {key: value for key, value in reward.identity().items() if key != "served_at"}
    return {"name": section.name, "label": section.label, "weight": section.weight, "identity": what}
