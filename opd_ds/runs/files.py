"""Every file that a run reads, found and held against the settings that name it; no network is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ds.cluster.roles import Roles
from opd_ds.cluster.world import World
from opd_ds.config.paths import resolve_ds_config, resolve_path
from opd_ds.config.schema import RunConfig
from opd_ds.config.teachers import TeacherSection
from opd_ds.data import PromptSet
from opd_ds.engine import (
    Schedule,
    frozen_ds_config,
    parameters_on_nvme,
    read_ds_config,
    student_ds_config,
    swapped_apart,
    zero_stage,
)
from opd_ds.errors import UserError, about
from opd_ds.models import family_class
from opd_ds.models.inspection import inspect
from opd_ds.rewards import rehearse
from opd_ds.runs.trackers import check_trackers
from opd_ds.training.networks import find_base
from opd_ds.training.remote_teachers import answering
from opd_ds.training.teachers import TeacherSpec


@dataclass(frozen=True)
class RunFiles:
    """Everything a run reads, found and checked."""

    model: Path
    start: Path | None
    teachers: dict[str, TeacherSpec]
    prompts: dict[str, PromptSet]
    eval_prompts: dict[str, PromptSet]
    student_ds_config: dict[str, Any]
    schedule: Schedule | None

    def prompt_sets(self, config: RunConfig) -> dict[str, PromptSet]:
        """All sets by their keys in the config."""
        return sets_by_key(config, self.prompts, self.eval_prompts)


def find_files(config: RunConfig, world: World) -> RunFiles:
    """Resolve and check every file the config names; loads no network.

    Args:
        world: the ranks that the run is planned for, those that hold teachers too.

    Raises:
        UserError: the first thing that is missing or contradictory.
    """
    roles = Roles(world, config.scoring.ranks, config.model.sequence_parallel)
    world = roles.training
    ds_path = resolve_ds_config(config.deepspeed, "deepspeed")
    ds_config = swapped_apart(student_ds_config(read_ds_config(ds_path), config, world, str(ds_path)), "student")
    schedule = Schedule.of(config, ds_config)
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer", {})
    if offload.get("device") == "nvme" and config.weight_snapshots:
        raise UserError(
            f"deepspeed = {config.deepspeed!r} keeps the master weights on NVMe, where no average or earlier policy "
            "can follow them; offload the optimizer to cpu (or keep none: student.ema.decay = 0 and, with "
            "teach.algorithm = 'guard', teach.kl = 0)"
        )
    for name, section in config.evaluated.items():
        for reward in section.rewards:
            rehearse(reward.name, f"{config.place(name)}.rewards", reward.options)
    prompts, eval_prompts = find_prompts(config)
    if world.is_main:
        check_trackers(config.trackers)
        _say_oddities(config, prompts, eval_prompts)
    model = find_base(config)
    start = resolve_path(config.student.start, "student.start") if config.student.start else None
    teachers = {
        name: _find_teacher(config, config.teacher_key(name), teacher, roles, model)
        for name, teacher in config.all_teachers.items()
    }
    _refuse_compiled_on_nvme(config, teachers, ds_config)
    if roles.teachers:
        answering(teachers, roles).check()
    elif world.size > 1:
        _refuse_uneven_forwards(config, teachers, ds_config)
    return RunFiles(model, start, teachers, prompts, eval_prompts, ds_config, schedule)


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


def sets_by_key(
    config: RunConfig, prompts: dict[str, PromptSet], eval_prompts: dict[str, PromptSet]
) -> dict[str, PromptSet]:
    """All prompt sets by their keys in the config."""
    sets = {f"tasks.{name}.prompts": found for name, found in prompts.items()}
    return sets | {f"{config.place(name)}.eval_prompts": found for name, found in eval_prompts.items()}


def _say_oddities(config: RunConfig, prompts: dict[str, PromptSet], eval_prompts: dict[str, PromptSet]) -> None:
    length = config.model.max_text_length or family_class(config.model.family).default_text_length
    for key, found in sets_by_key(config, prompts, eval_prompts).items():
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


def _find_teacher(config: RunConfig, key: str, teacher: TeacherSection, roles: Roles, model: Path) -> TeacherSpec:
    ds_config = None
    place = resolve_path(teacher.path, f"{key}.path")
    with about(f"{key}.path = {teacher.path!r}"):
        found = inspect(place)
        found.refuse_problem()
    apart = roles.teachers > 0
    teacher = teacher.placed(key, config.student.kind, is_lora=found.is_adapter, is_base=place == model, apart=apart)
    if teacher.placement == "zero_inference":
        path = resolve_ds_config(teacher.deepspeed or "zero_inference_gpu", f"{key}.deepspeed")
        ranks = roles.teachers or roles.world.size
        completed = frozen_ds_config(read_ds_config(path), config.precision, ranks, str(path))
        ds_config = swapped_apart(completed, key)
    return TeacherSpec(teacher, place, ds_config)


def _refuse_compiled_on_nvme(config: RunConfig, teachers: dict[str, TeacherSpec], ds_config: dict[str, Any]) -> None:
    """There DeepSpeed's hooks are inside the blocks, and would be compiled anew with every call."""
    swapped = {"deepspeed": ds_config} | {
        f"{config.teacher_key(name)}.deepspeed": spec.ds_config for name, spec in teachers.items() if spec.ds_config
    }
    for key, found in swapped.items():
        if config.model.compile_blocks and parameters_on_nvme(found):
            raise UserError(
                f"model.compile_blocks = true cannot be with {key}, which keeps parameters on NVMe: they come layer by "
                "layer, inside the blocks; set model.compile_blocks = false, or offload parameters to cpu"
            )


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
