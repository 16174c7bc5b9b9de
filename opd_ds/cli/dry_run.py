"""`opd-ds train --dry-run`: the checks of a start, and everything that is derived; nothing starts."""

from __future__ import annotations

import json
from collections.abc import Iterable

import yaml

from opd_ds.cluster.roles import Roles
from opd_ds.cluster.world import World
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import TrainedSection
from opd_ds.data import rows_on_a_rank
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
    roles = Roles(world, config.scoring.ranks, config.model.sequence_parallel)
    world, settings = roles.drawing, config.rollout
    trained = config.trained_steps
    updates, rounds = config.train.updates_per_round, config.tasks_of(0)
    rows = {task: rows_on_a_rank(config.samples(task), world.size, updates) for task in config.tasks}
    pairs = [count * trained for count in rows.values()]
    filled = {task: count * world.size - config.samples(task) for task, count in rows.items()}
    one_pass = family.passes(settings.guidance) == 1
    passes = "one pass" if one_pass else "two passes (guidance), batched in one"
    tasks = ", ".join(
        f"{name} (teacher {files.teachers[name].path.name})" if name in files.teachers else f"{name} ({_rewards(task)})"
        for name, task in config.tasks.items()
    )
    samples = [config.samples(task) for task in config.tasks]
    prompts = [count // config.group_size for count in samples]
    group = [f"prompts a round        {_each(prompts)} per task, {config.group_size} images of each"]
    asked = [-(-count // config.scoring_micro_batch) * config.frozen_velocities for count in pairs]
    trainings = [-(-count // updates // config.train.micro_batch) * updates for count in pairs]
    if settings.mode == "fused":
        count = -(-sum(rows[task] for task in rounds) // settings.micro_batch)
        work = [
            f"rollout and training   {settings.steps} steps in {count} micro-batches over all tasks, {passes}, then "
            "one optimizer step",
        ]
    else:
        work = [
            *(
                []
                if settings.mode == "buffered"
                else ["rollout.mode           auto, decided at the start by its GPUs; buffered:"]
            ),
            f"rollout                {settings.steps} steps in micro-batches of {settings.micro_batch}, {passes}",
            f"scoring                {_each(asked)} forwards of frozen weights per task and process",
            f"training               {_each(trainings)} micro-batches of {config.train.micro_batch} per task and "
            f"process, {config.train.inner_epochs} x, and {config.steps_per_round} optimizer steps",
        ]
    frames = f", {family.frames} frames" if family.frames else ""
    lines = [
        f"processes              {roles.world.size}, {roles.world.local_size} a node"
        + (f"; the last {roles.teachers} hold teachers" if roles.teachers else "")
        + (f"; {roles.sharing} share each sequence" if roles.sharing > 1 else ""),
        f"starts from            {f'{resumed.checkpoint}, {resumed.done} rounds done' if resumed else 'round 0'}",
        f"height x width         {_sizes(config) or f'{family.height} x {family.width}'}{frames}",
        f"tasks                  {len(config.tasks)}: {tasks}",
        f"tasks of a round       {_schedule(config)}",
        f"samples a round        {_each(samples)} per task",
        *(group if config.group_size > 1 else []),
        f"samples per process    {_each(rows.values())} per task"
        + (f" ({_each(filled.values())} padding samples at weight 0)" if any(filled.values()) else ""),
        f"trained steps          {trained} of {settings.steps}: {_each(pairs)} (state, step) pairs per task and "
        "process",
        *work,
        f"learning rate          {_rates(config, files)}",
        f"rounds                 {config.run.rounds}, a checkpoint every {config.run.checkpoint_every}",
    ]
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    ds_config = json.dumps(files.student_ds_config, indent=2)
    return "\n".join(["# run", resolved, "# arithmetic", *lines, "", f"# ds_config ({config.deepspeed})", ds_config])


def _sizes(config: RunConfig) -> str:
    """Of several: which, and who chooses; else nothing."""
    model = config.model
    own = {"prompts": "the prompts' own", "pictures": "the pictures'"}.get(model.size_from)
    if not model.sizes:
        return own or ""
    chosen = f"nearest to {own}" if own else "drawn"
    return f"{', '.join(f'{height} x {width}' for height, width in model.sizes)} ({chosen})"


def _each(counts: Iterable[int]) -> str:
    """One number where all tasks have it."""
    numbers = list(counts)
    return ", ".join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))


def _schedule(config: RunConfig) -> str:
    if config.train.schedule == "together" or len(config.tasks) == 1:
        return "all"
    shares = ", ".join(f"{task} {config.share_of_rounds(task):.0%}" for task in config.tasks)
    return f"one, {'in turn' if config.train.schedule == 'alternate' else 'drawn'}: {shares} of the rounds"


def _rates(config: RunConfig, files: RunFiles) -> str:
    steps = config.steps_per_round
    rates = learning_rates(files.schedule, files.student_ds_config, config.run.rounds * steps)
    idle = idle_rounds(config, files)
    text = f"{rates[0]:.3g} in the first step, {max(rates):.3g} at most, {rates[-1]:.3g} in the last"
    return f"{text}; 0 in {idle} of {config.run.rounds} rounds, which train nothing" if idle else text


def _rewards(task: TrainedSection) -> str:
    return " + ".join(reward.label for reward in task.rewards)
