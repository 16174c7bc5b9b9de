"""Everything that a start refuses, found before a network is loaded.

The dry run, `launch`, `doctor` and the start itself call the same function.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from peft import LoraConfig

from opd_ds.cluster.world import World
from opd_ds.config.schema import RunConfig
from opd_ds.config.without_effect import settings_without_effect
from opd_ds.data import Sizes, check_sizes
from opd_ds.engine import Group, check_shapes
from opd_ds.errors import UserError, about
from opd_ds.models import ModelFamily, lora
from opd_ds.models.inspection.fitting import check_weights
from opd_ds.models.quantization import check_quantization
from opd_ds.runs.encodings import check_pictures, check_text_cache
from opd_ds.runs.files import RunFiles, find_files
from opd_ds.runs.identity import run_identity
from opd_ds.runs.resume import ResumePoint, Start, find_resume_point, refuse_other_changes, refuse_other_run
from opd_ds.runs.rewards import check_rewards
from opd_ds.runs.rollout_mode import with_decided_mode
from opd_ds.runs.without_effect import files_without_effect
from opd_ds.training.networks import check_guidances, load_family, trained_networks
from opd_ds.training.steps import choose_steps
from opd_ds.training.trainer import Trainer
from opd_ds.utils.folders import try_to_write


@dataclass(frozen=True)
class Checked:
    """A run that may start.

    Attributes:
        config: with the placement of every teacher decided; before a real start also the rollout mode.
        identity: what a checkpoint must share with the run; None where there was no checkpoint to compare with, and on
            all ranks but 0.
    """

    config: RunConfig
    files: RunFiles
    family: ModelFamily
    resumed: ResumePoint | None
    identity: dict[str, Any] | None


def preflight(config: RunConfig, group: Group, world: World, start: Start | None) -> Checked:
    """Check all that can be checked from settings, headers and folders. Nothing is written, but for the lock of
    `start.occupy`. Collective.

    Args:
        group: who checks: all ranks of the run, those that hold teachers too, or `Alone`.
        world: the ranks that the run is planned for.
        start: how the run would be started; None: checkpoints are not looked at.

    Raises:
        UserError: on every rank, with the message of the first rank that failed.
    """
    with group.raise_on_any_rank():
        if start is not None:
            refuse_other_changes(config, start.allowed)
        _check_output(config)
        files = find_files(config, world)
        config = config.with_teachers({name: spec.settings for name, spec in files.teachers.items()})
        family = load_family(config, files.model, group.device)
        sets = files.prompt_sets(config)
        check_sizes(config.model, family, sets)
        sizes = Sizes(config.model, family).possible(sets.values())
        for size in sizes:
            _check_sampling(config, family.at(*size))
        check_pictures(config, family, sets, decode=world.is_main)
        for name, section in config.evaluated.items():
            place = config.place(name)
            own = {key: found for key, found in sets.items() if key in (f"{place}.prompts", f"{place}.eval_prompts")}
            check_rewards(section.rewards, f"{place}.rewards", family, own)
        if world.is_main:
            check_text_cache(config, family, sets.values())
        with about(f"model.path = {config.model.path!r}"):
            family.check_same_weights(files.model)
        _check_teachers(config, files, family)
        _check_student(config, files, family)
        _check_quantization(config)
        for size in sizes:
            trainer_class(config).check(config, family.at(*size))
        if world.is_main:
            for line in (*settings_without_effect(config), *files_without_effect(config, files, family)):
                logging.getLogger("opd_ds").warning("%s", line)
    if start is not None:
        with group.raise_on_any_rank():
            if group.world.is_main:
                start.occupy(config.run.output_dir)
    resumed = None if start is None else find_resume_point(config, start, group)
    identity = None
    if start is not None and resumed is not None:
        with group.raise_on_any_rank():
            if group.world.is_main:
                identity = run_identity(config, files, family)
                refuse_other_run(config, identity, resumed, start.allowed)
    if group.exchanges:  # where a run is only looked at, its devices are not known
        config = with_decided_mode(config, files, group, resumed)
    return Checked(config, files, family, resumed, identity)


def trainer_class(config: RunConfig) -> type[Trainer]:
    """What runs the rounds, as the config's algorithm names it."""
    module, name = config.trainer.split(":")
    found: type[Trainer] = getattr(import_module(module), name)
    return found


def _check_output(config: RunConfig) -> None:
    folder = config.run.output_dir
    try:
        try_to_write(folder)
    except OSError as error:
        raise UserError(
            f"run.output_dir = {str(folder)!r}: cannot be written: {error.strerror}; give another folder"
        ) from error


def _check_sampling(config: RunConfig, family: ModelFamily) -> None:
    family.check_attention()
    family.check_sequences(config.model.sequence_parallel)
    family.check_steps("rollout.steps", config.rollout.steps)
    family.check_steps("evaluation.steps", config.evaluation.steps)
    check_guidances(config, family)


def _check_teachers(config: RunConfig, files: RunFiles, family: ModelFamily) -> None:
    for name, spec in files.teachers.items():
        key, settings = f"{config.teacher_key(name)}.path", spec.settings
        check_weights(family, key, settings.path, spec.path, config.model.path, trust_base=settings.trust_base)


def _check_student(config: RunConfig, files: RunFiles, family: ModelFamily) -> None:
    """What the student starts from, and where its LoRA adapts."""
    value, chosen = str(config.student.start), config.student
    trained = trained_networks(chosen, family)
    _check_stages(config, family, trained)
    if chosen.kind == "lora":
        _check_targets(chosen.lora.targets, family)
    else:
        named = family.empty_transformer().named_parameters()
        check_shapes(files.student_ds_config, {name: weight.shape for name, weight in named})
    if files.start is None:
        return
    check_weights(family, "student.start", value, files.start, config.model.path, trust_base=True)
    is_adapter = lora.is_adapter(files.start)
    if chosen.kind != "lora":
        if not is_adapter:
            with about(f"student.start = {value!r}"):
                family.check_same_weights(files.start)  # the export has the base's configuration
        return
    if not is_adapter:
        raise UserError(
            f"student.start = {value!r} is a full checkpoint and student.kind = 'lora'; set model.path to it instead, "
            "or student.kind to 'full'"
        )
    theirs, state = lora.read_adapter(files.start, family.pipeline_class)
    if len(trained) < len(family.networks) and any(not key.startswith(f"{trained[0]}.") for key in state):
        raise UserError(
            f"student.start = {value!r} adapts another network than student.networks = {chosen.networks!r} trains; "
            "give a LoRA of that one, or set student.networks to 'both'"
        )
    if theirs.r != chosen.lora.rank:
        raise UserError(
            f"student.start = {value!r} has rank {theirs.r}, student.lora.rank is {chosen.lora.rank}; set it to the "
            "former"
        )


def _check_quantization(config: RunConfig) -> None:
    sections = {"student": config.student.quantize}
    sections |= {config.teacher_key(name): teacher.quantize for name, teacher in config.all_teachers.items()}
    for key, kind in sections.items():
        if kind is not None:
            check_quantization(f"{key}.quantize", kind)
    student = config.student
    if student.quantize is not None and config.model.compile_blocks and not student.gradient_checkpointing:
        # Inductor (torch 2.13) finds the same whole weight in forward and backward, and makes it once.
        raise UserError(
            f"model.compile_blocks = true with student.quantize = {student.quantize!r}: a compiled block keeps its "
            "weights whole from forward to backward, which is the memory that quantizing saves; set "
            "student.gradient_checkpointing, or remove one of the two"
        )


def _check_stages(config: RunConfig, family: ModelFamily, trained: tuple[str, ...]) -> None:
    """Of two networks the trained steps must ask those that are trained, each of them and no other."""
    setting, stages = config.rollout.trained_steps, family.stages(family.sigmas(config.rollout.steps)[:-1])
    if family.boundary is None or (setting.queries is not None and trained == family.networks):
        return
    theirs = [step for step, stage in enumerate(stages) if family.networks[stage] in trained]
    chosen = [*range(len(stages))]
    if setting.queries is None:
        chosen = choose_steps(setting, len(stages), 0, 0, "", [0])[0].tolist()
    idle = [part for part in trained if part not in {family.networks[stages[step]] for step in chosen}]
    if not idle and set(chosen) <= set(theirs):
        return
    what = f"no trained step asks {' and '.join(idle)}" if idle else "trained steps ask the other network, too"
    raise UserError(
        f"student.networks = {config.student.networks!r}: {what}; of {len(stages)} steps those above sigma "
        f"{family.boundary:g} ask the first network: set rollout.trained_steps.steps to some of {theirs}"
    )


def _check_targets(targets: tuple[str, ...] | None, family: ModelFamily) -> None:
    """Each of `student.lora.targets` must match a module: PEFT is content when one of them does."""
    if targets is None:
        return
    for target in targets:
        with about("student.lora.targets"):
            lora.new_adapter(family.empty_transformer(), "checked", LoraConfig(r=1, target_modules=[target]))
