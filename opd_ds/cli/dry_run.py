"""`opd-ds train --dry-run`: the checks of a start, and everything that is derived; nothing starts."""

from __future__ import annotations

import json

import yaml

from opd_ds.cluster.world import World
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import TrainedSection
from opd_ds.data import shard
from opd_ds.engine import Alone, learning_rates
from opd_ds.runs.files import RunFiles
from opd_ds.runs.preflight import preflight
from opd_ds.runs.resume import Start
from opd_ds.runs.without_effect import idle_rounds


def check_start(config: RunConfig, nodes: int, tasks: int, allowed: list[str]) -> None:
    """What the processes of a batch job would check, which resume where they can.

    Raises:
        UserError: as a real start would.
    """
    world = World(size=nodes * tasks, local_size=tasks)
    preflight(config, Alone(), world, Start("auto", tuple(allowed)))


def describe(config: RunConfig, world: World, start: Start) -> str:
    """The resolved run, the batch arithmetic and the completed ds_config. No network is loaded, nothing is written.

    Raises:
        UserError: as a real start would.
    """
    checked = preflight(config, Alone(), world, start)
    config, files, family, resumed = checked.config, checked.files, checked.family, checked.resumed
    settings = config.rollout
    trained = config.trained_steps
    part = shard(settings.samples, 0, world.size)
    pairs = len(part) * trained
    filled = len(part) * world.size - settings.samples
    one_pass = family.passes(settings.guidance) == 1
    passes = "one pass" if one_pass else "two passes (guidance), batched in one"
    tasks = ", ".join(
        f"{name} (teacher {files.teachers[name].path.name})" if name in files.teachers else f"{name} ({_rewards(task)})"
        for name, task in config.tasks.items()
    )
    prompts = settings.samples // config.group_size
    group = [f"prompts a round        {prompts} per task, {config.group_size} images of each"]
    asked = -(-pairs // config.scoring_micro_batch) * config.frozen_velocities
    at_once = config.tasks_per_round
    if settings.mode == "fused":
        count = -(-len(part) * len(config.tasks) // settings.micro_batch)
        work = [
            f"rollout and training   {settings.steps} steps in {count} micro-batches over all tasks, {passes}, then "
            "one optimizer step",
        ]
    else:
        work = [
            f"rollout                {settings.steps} steps in micro-batches of {settings.micro_batch}, {passes}",
            f"scoring                {asked} forwards of frozen weights per task and process",
            f"training               {-(-pairs // config.train.micro_batch) * at_once} micro-batches of "
            f"{config.train.micro_batch} per process, then one optimizer step",
        ]
    frames = f", {family.frames} frames" if family.frames else ""
    lines = [
        f"processes              {world.size}, {world.local_size} a node",
        f"starts from            {f'{resumed.checkpoint}, {resumed.done} rounds done' if resumed else 'round 0'}",
        f"height x width         {family.height} x {family.width}{frames}",
        f"tasks                  {len(config.tasks)}: {tasks}",
        f"samples a round        {settings.samples} per task, {settings.samples * at_once} in all",
        *(group if config.group_size > 1 else []),
        f"samples per process    {len(part)} per task"
        + (f" ({filled} padding samples at weight 0, because {settings.samples} is not a multiple)" if filled else ""),
        f"trained steps          {trained} of {settings.steps}: {pairs} (state, step) pairs per task and process",
        *work,
        f"learning rate          {_rates(config, files)}",
        f"rounds                 {config.run.rounds}, a checkpoint every {config.run.checkpoint_every}",
    ]
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    ds_config = json.dumps(files.student_ds_config, indent=2)
    return "\n".join(["# run", resolved, "# arithmetic", *lines, "", f"# ds_config ({config.deepspeed})", ds_config])


def _rates(config: RunConfig, files: RunFiles) -> str:
    steps = config.train.inner_epochs
    rates = learning_rates(files.schedule, files.student_ds_config, config.run.rounds * steps)
    idle = idle_rounds(config, files)
    text = f"{rates[0]:.3g} in the first step, {max(rates):.3g} at most, {rates[-1]:.3g} in the last"
    return f"{text}; 0 in {idle} of {config.run.rounds} rounds, which train nothing" if idle else text


def _rewards(task: TrainedSection) -> str:
    return " + ".join(reward.label for reward in task.rewards)
