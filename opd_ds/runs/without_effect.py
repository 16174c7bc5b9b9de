"""What lies at the paths of a run and does nothing, or less than it seems; beside `config.without_effect`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from peft import LoraConfig

from opd_ds.config.schema import RunConfig
from opd_ds.config.without_effect import all_guidances
from opd_ds.engine import learning_rates, zero_stage
from opd_ds.models import ModelFamily, lora
from opd_ds.models.inspection import differing_parts
from opd_ds.runs.files import RunFiles

_EXPECTED_IDLE = 2  # DeepSpeed's schedulers (0.19) begin with one or two steps at rate 0, a cosine ends with one


def files_without_effect(config: RunConfig, files: RunFiles, family: ModelFamily) -> Iterator[str]:
    """One line for each, with the key, the value, and why it does nothing."""
    stage, gather = zero_stage(files.student_ds_config), config.rollout.gather
    if stage < 3 and gather != "auto":
        yield f"rollout.gather = {gather!r} is read under ZeRO-3 only, and deepspeed = {config.deepspeed!r} is {stage}"
    if (idle := idle_rounds(config, files)) > _EXPECTED_IDLE:
        yield (
            f"the scheduler of deepspeed = {config.deepspeed!r} has the learning rate 0 in {idle} of "
            f"{config.run.rounds} rounds, which train nothing"
        )
    if all(value == 1 for value in all_guidances(config).values()):
        for key, prompts in files.prompt_sets(config).items():
            if prompts.own_negatives:
                yield f"{key} has negative prompts, which are not read where every guidance is 1"
    placed = {} if files.start is None else {"student.start": (str(config.student.start), files.start)}
    for name, spec in files.teachers.items():
        key = config.teacher_key(name)
        if spec.path == files.model and not _asks_for_nothing(config, name):
            continue
        placed[f"{key}.path"] = (spec.settings.path, spec.path)
        if spec.settings.trust_base and not spec.is_lora:
            yield f"{key}.trust_base is for LoRAs, and {key}.path = {spec.settings.path!r} is a full checkpoint"
    for key, (value, path) in placed.items():
        if path == files.model:
            yield f"{key} = {value!r} is model.path itself"
        elif lora.is_adapter(path):
            if lora.is_empty(path, family.pipeline_class):
                yield f"{key} = {value!r} changes nothing: all its lora_B are zero, as before a training's first step"
        elif path.is_dir() and (others := differing_parts(path, files.model)):
            yield (
                f"{key} = {value!r} has another {', '.join(others)} than model.path, which is not read: prompts are "
                "encoded and latents decoded by those of model.path"
            )
    if files.start is not None:
        yield from _targets(config, files.start, family)


def _asks_for_nothing(config: RunConfig, name: str) -> bool:
    """Whether the base as a teacher asks for what the base draws. With another guidance it asks for more, and what is
    no task's teacher is the base on purpose.
    """
    return name in config.tasks and config.teachers[name].guidance == config.student_guidance(name)


def idle_rounds(config: RunConfig, files: RunFiles) -> int:
    """Rounds all of whose optimizer steps have the learning rate 0."""
    steps = config.steps_per_round
    rates = learning_rates(files.schedule, files.student_ds_config, config.run.rounds * steps)
    return sum(not any(rates[first : first + steps]) for first in range(0, len(rates), steps))


def _targets(config: RunConfig, start: Path, family: ModelFamily) -> Iterator[str]:
    targets = config.student.lora.targets
    if config.student.kind != "lora" or targets is None:
        return
    network = family.empty_transformer()
    lora.new_adapter(network, "wanted", LoraConfig(r=1, target_modules=list(targets)))
    theirs = lora.read_adapter(start, family.pipeline_class)[1]
    count = len(theirs) // 2
    if theirs.keys() != lora.adapter_parameters(network, "wanted").keys():
        yield (
            f"student.lora.targets is not read with student.start = {str(config.student.start)!r}, whose {count} "
            "adapted modules are trained, and they are others"
        )
