"""What a checkpoint must share with the run that resumes it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import ANCHOR, WeightedReward
from opd_ds.config.teachers import AnchorSection
from opd_ds.models import ModelFamily
from opd_ds.rewards import Reward
from opd_ds.runs.files import RunFiles
from opd_ds.utils.hashing import all_weights_sha256


def run_identity(config: RunConfig, files: RunFiles, family: ModelFamily) -> dict[str, Any]:
    """What decides a run's numbers: settings, and hashes of all weights and prompts. Speed settings are left out."""
    kept = config.resume_settings()
    start = [] if files.start is None else [files.start]
    sha256 = all_weights_sha256([files.model, *start, *(spec.path for spec in files.teachers.values())])
    if files.start is not None:
        kept["student"]["start"] = sha256[files.start]

    def teacher(name: str) -> dict[str, Any]:
        spec = files.teachers[name]
        found = {"teacher_sha256": sha256[spec.path], "teacher_guidance": spec.settings.guidance}
        if spec.settings.quantize is not None:
            found["teacher_quantize"] = spec.settings.quantize
        return found

    tasks: dict[str, dict[str, Any]] = {
        name: {"prompts_sha256": files.prompts[name].sha256, "weight": task.weight, "guidance": task.guidance}
        for name, task in config.tasks.items()
    }
    for name in config.teachers:
        tasks[name] |= teacher(name)
    for name, task in config.tasks.items():
        if config.learns_from_rewards:
            tasks[name]["rewards"] = [
                {"name": reward.name, "label": reward.label, "weight": reward.weight}
                for reward in task.rewards
                if isinstance(reward, WeightedReward)
            ]
        if task.samples is not None:
            tasks[name]["samples"] = task.samples
        if config.train.schedule != "together":
            tasks[name]["turns"] = task.turns
    for key in ("inner_epochs", "updates_per_round", "schedule"):
        kept[key] = getattr(config.train, key)
    anchor = config.all_teachers.get(ANCHOR)
    if isinstance(anchor, AnchorSection):
        kept["anchor"] = {"weight": anchor.weight, **teacher(ANCHOR)}
    # What the DeepSpeed JSON may set beside the run config. Which of the Adams computes it is a matter of placement.
    ds_config = copy.deepcopy(files.student_ds_config)
    ds_config["optimizer"]["params"].pop("torch_adam", None)
    kept["ds_config"] = {key: ds_config.get(key) for key in ("optimizer", "scheduler", "gradient_clipping")}
    base = {
        "sha256": sha256[files.model],
        "negative_prompt": family.negative_prompt,
        "latent_shape": list(family.latent_shape),
        "max_text_length": family.max_text_length,
        "reference_side": family.reference_side,
    }
    if family.low_noise_guidance is not None:  # as in checkpoints from before there was one
        base["low_noise_guidance"] = family.low_noise_guidance
    # Only where they are set: checkpoints from before there were sizes go on.
    if config.model.sizes:
        base["sizes"] = [list(size) for size in config.model.sizes]
    if config.model.size_from != "drawn":
        base["size_from"] = config.model.size_from
    return {"seed": config.run.seed, "base": base, "tasks": tasks, **kept}


def with_rewards(identity: dict[str, Any], rewards: Mapping[str, Reward]) -> dict[str, Any]:
    """`identity` with what decides the numbers of the rewards that are learned from; not where they are served, which
    may change from one start to the next.
    """
    found = copy.deepcopy(identity)
    for task in found["tasks"].values():
        for entry in task.get("rewards", ()):
            facts = rewards[entry["label"]].identity()
            entry["identity"] = {key: value for key, value in facts.items() if key != "served_at"}
    return found
