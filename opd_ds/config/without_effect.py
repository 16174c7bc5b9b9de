"""Settings that are valid and do nothing, or nearly nothing, so that a run would end well and surprise its user."""

from __future__ import annotations

from collections.abc import Iterator

from opd_ds.config.base import Section
from opd_ds.config.objectives import PaperObjective
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import BASE, STOCHASTIC_KERNELS, EmaSection, WeightedReward

_TINY_SHARE, _MOSTLY, _TINY_RATE = 1e-3, 0.5, 1e-9


def settings_without_effect(config: RunConfig) -> list[str]:
    """One line for each, with the key, the value, why it does nothing, and what would."""
    return [*_average(config), *_schedule(config), *_evaluation(config), *_student(config), *_tasks(config)]


def share_of_start(ema: EmaSection, steps: int) -> float:
    """How much of the average of `steps` optimizer steps are still the weights that the student started from."""
    share = 1.0
    for step in range(ema.every, steps + 1, ema.every):
        share *= min(ema.decay, (1 + step) / (10 + step)) if ema.warmup else ema.decay
    return share


def _is_given(section: Section, name: str) -> bool:
    """Not `model_fields_set`: a run's own config.yaml names every key."""
    return bool(getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True))


def _average(config: RunConfig) -> Iterator[str]:
    ema, steps = config.student.ema, config.run.rounds * config.steps_per_round
    if ema.decay == 0:
        for name in ("warmup", "every"):
            if _is_given(ema, name):
                yield f"student.ema.{name} is not read with student.ema.decay = 0, which keeps no average"
    elif ema.every > steps:
        yield (
            f"student.ema.every = {ema.every}: the run has {steps} optimizer steps, so the average is never updated; "
            "the last weights are evaluated and exported instead"
        )
    elif (share := share_of_start(ema, steps)) > _MOSTLY:
        yield (
            f"student.ema.decay = {ema.decay:g}: after {steps} optimizer steps the average, which is evaluated and "
            f"exported, is still to {share:.0%} what the student started from; set a smaller decay, warmup or every"
        )


def _schedule(config: RunConfig) -> Iterator[str]:
    run, optimizer = config.run, config.optimizer
    if _is_given(run, "checkpoint_every") and run.checkpoint_every > run.rounds:
        yield (
            f"run.checkpoint_every = {run.checkpoint_every} is more than run.rounds = {run.rounds}: there is no "
            "checkpoint before the last round to go on from"
        )
    if optimizer.warmup_rounds >= run.rounds:
        yield (
            f"optimizer.warmup_rounds = {optimizer.warmup_rounds}: the run ends after {run.rounds} rounds, before the "
            "learning rate is reached"
        )
    if optimizer.lr < _TINY_RATE:
        yield f"optimizer.lr = {optimizer.lr:g} moves no weight noticeably"


def _evaluation(config: RunConfig) -> Iterator[str]:
    run, watch = config.run, config.watch
    drawn = [section for section in config.evaluated.values() if section.eval_prompts is not None]
    every = {"run.eval_every": run.eval_every, "run.image_every": run.image_every, "watch.every": watch.every}
    for key, rounds in every.items():
        if rounds > run.rounds:
            yield f"{key} = {rounds} is more than run.rounds = {run.rounds}: it is never due"
    if 0 < run.eval_every <= run.rounds and not any(section.rewards for section in drawn):
        yield f"run.eval_every = {run.eval_every}: no task or probe has both eval_prompts and rewards to score them by"
    if 0 < run.image_every <= run.rounds and not (drawn and config.evaluation.grid_prompts):
        yield f"run.image_every = {run.image_every}: no grids without eval_prompts and evaluation.grid_prompts"
    if _is_given(config, "evaluation") and not drawn:
        yield "evaluation: no task or probe has eval_prompts, so nothing is evaluated"
    if watch.every and not config.rewards:
        yield f"watch.every = {watch.every}: no task has rewards to watch"
    if watch.every and not (watch.rollouts or (watch.held_out and drawn)):
        yield f"watch.every = {watch.every}: neither watch.rollouts nor watch.held_out (with eval_prompts) has images"
    for name, section in config.evaluated.items():
        scored = section.eval_prompts is not None or watch.every or config.learns_from_rewards
        if section.rewards and not scored:
            yield f"{config.place(name)}.rewards score nothing without {config.place(name)}.eval_prompts or watch.every"


def all_guidances(config: RunConfig) -> dict[str, float]:
    """By key."""
    found = {"rollout.guidance": config.rollout.guidance}
    found |= {
        f"{config.place(name)}.guidance": section.guidance
        for name, section in config.evaluated.items()
        if section.guidance is not None
    }
    return found | {f"{config.teacher_key(name)}.guidance": one.guidance for name, one in config.all_teachers.items()}


def _student(config: RunConfig) -> Iterator[str]:
    student, model, rollout = config.student, config.model, config.rollout
    if student.kind == "full" and _is_given(student, "lora"):
        yield "student.lora is not read with student.kind = 'full'"
    if model.text_cache is not None and model.text_encoders != "cached":
        yield f"model.text_cache is not read with model.text_encoders = {model.text_encoders!r}; set that to 'cached'"
    sets = [task.prompts for task in config.tasks.values()]
    sets += [section.eval_prompts for section in config.evaluated.values() if section.eval_prompts is not None]
    if model.size_from == "pictures" and not any(section.pictures for section in sets):
        yield "model.size_from = 'pictures': no prompt set has pictures, so all images have the run's size"
    if rollout.kernel in STOCHASTIC_KERNELS and rollout.noise_level == 0:
        yield f"rollout.kernel = {rollout.kernel!r} draws no noise with rollout.noise_level = 0"
    guidances = all_guidances(config)
    turbo = "turbo" in model.path.rstrip("/").rpartition("/")[2].lower()  # their folders do not say it
    for key, value in guidances.items():
        if turbo and value > 1:
            yield f"{key} = {value:g}: by its name {model.path} is distilled to be drawn without guidance, which is 1"
        if value < 1:
            ignored = "ignores the prompt" if value == 0 else "weakens the prompt"
            yield f"{key} = {value:g} {ignored}: guidance is off at 1"
    if rollout.negative_every > 1 and all(config.student_guidance(task) == 1 for task in config.tasks):
        yield (
            f"rollout.negative_every = {rollout.negative_every} is read where the student has a guidance, and it has "
            "none: no pass of it is made with the negative prompt"
        )
    if model.negative_prompt and all(value == 1 for value in guidances.values()):
        yield "model.negative_prompt is not read where every guidance is 1"


def _tasks(config: RunConfig) -> Iterator[str]:
    objective = config.algorithm
    together = isinstance(objective, PaperObjective) and objective.guided == "together"
    if together and _is_given(objective, "direction_weight"):
        yield "objective.direction_weight is read with objective.guided = 'apart' only"
    if "base" in type(config).model_fields and _is_given(config, "base") and BASE not in config.all_teachers:
        yield "base is read only with objective.extrapolation above 0"
    for name, task in config.tasks.items():
        given = [one for one in task.rewards if isinstance(one, WeightedReward) and one.weight != 1]
        if given and not config.learns_from_rewards:
            yield f"tasks.{name}.rewards: the weight of {given[0].label} is not read without reward_term"
    largest = max(task.weight for task in config.tasks.values())
    for name, task in config.tasks.items():
        if task.weight < _TINY_SHARE * largest:
            yield f"tasks.{name}.weight = {task.weight:g} is lost beside another task's {largest:g}"
        if config.train.schedule == "together" and task.turns > 1:
            yield f"tasks.{name}.turns = {task.turns} is not read with train.schedule = 'together'"
    untrained = dict.fromkeys(config.tasks)
    for index in range(config.run.rounds):
        for name in config.tasks_of(index):
            untrained.pop(name, None)
        if not untrained:
            break
    for name in untrained:
        yield f"train.schedule = {config.train.schedule!r}: none of the {config.run.rounds} rounds trains task {name}"
