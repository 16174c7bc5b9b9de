"""Where a run resumes, and whether it is the run that wrote the checkpoint. Nothing on disk is changed here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_ds.checkpoint.store import (
    CHECKPOINTS_FOLDER,
    STATE_FILE,
    CheckpointStore,
    any_checkpoint,
    read_state,
)
from opd_ds.cluster.world import JOB_VARIABLE
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import ANCHOR, OptimizerSection
from opd_ds.engine import Group
from opd_ds.errors import UserError, about, nearest, shown
from opd_ds.runs.output_lock import refuse_in_use
from opd_ds.utils.nested import flat

RESTARTS_VARIABLE = "SLURM_RESTART_COUNT"

# Entries of an identity that users know by another key.
_KEYS = {
    "seed": "run.seed",
    "inner_epochs": "train.inner_epochs",
    "updates_per_round": "train.updates_per_round",
    "schedule": "train.schedule",
    "base.sha256": "model.path",
    "base.negative_prompt": "model.negative_prompt",
    "base.latent_shape": "model.height, width or frames",
    "base.sizes": "model.sizes",
    "base.size_from": "model.size_from",
    "base.max_text_length": "model.max_text_length",
    "base.low_noise_guidance": "model.low_noise_guidance",
}
# Of checkpoints from before there was a choice.
_ABSENT = {"updates_per_round": 1, "schedule": "together"}
_OF_A_REWARD = ".identity."
# Entries of the completed ds_config, and the settings that they are filled from.
_FILLED_FROM = {
    "ds_config.optimizer.params.": ("lr", "betas", "eps", "weight_decay"),
    "ds_config.gradient_clipping": ("max_grad_norm",),
    "ds_config.scheduler": ("lr", "warmup_rounds", "schedule"),
}


@dataclass(frozen=True)
class Start:
    """How a run is asked to start.

    Attributes:
        resume: `never` (refuses an output folder with checkpoints), `auto` (the newest checkpoint, or a fresh start),
            or the path of one checkpoint.
        allowed: keys of the run config whose values may differ from those that the checkpoint was written with.
        occupy: what rank 0 does with the output folder before checkpoints are looked at. Raises UserError where another
            run writes there; a real start also locks it.
    """

    resume: str = "never"
    allowed: tuple[str, ...] = ()
    occupy: Callable[[Path], None] = refuse_in_use


@dataclass(frozen=True)
class ResumePoint:
    """A whole checkpoint, its `state.json`, and the damaged checkpoints that are newer."""

    checkpoint: Path
    state: dict[str, Any]
    damaged: list[Path] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Rounds."""
        return int(self.state["round"])


def find_resume_point(config: RunConfig, start: Start, group: Group) -> ResumePoint | None:
    """The checkpoint to go on from, whole; None for a fresh start. Collective.

    Raises:
        UserError: the output folder is another run's, there is no such checkpoint, it is damaged, or it is further than
            `run.rounds`.
    """
    run = config.run
    store = CheckpointStore(run.output_dir / CHECKPOINTS_FOLDER, run.keep_checkpoints, group)
    checkpoint, damaged = _find(store, start.resume, group)
    if checkpoint is None:
        return None
    with group.raise_on_any_rank():
        point = ResumePoint(checkpoint, read_state(checkpoint), damaged)
        if point.done > run.rounds:
            raise UserError(
                f"--resume {checkpoint}: {point.done} rounds are done, and run.rounds = {run.rounds}; set it to "
                f"{point.done} to evaluate and export this state, to more to go on, or give --resume the folder of an "
                "earlier checkpoint"
            )
    return point


def _find(store: CheckpointStore, resume: str, group: Group) -> tuple[Path | None, list[Path]]:
    if resume == "auto":
        return store.newest_whole()
    if resume == "never":
        with group.raise_on_any_rank():
            if (there := any_checkpoint(store.folder)) is not None:
                raise UserError(
                    f"run.output_dir already holds {there}; give --resume auto to go on, or another run.output_dir"
                )
        return None, []
    requeued = os.environ.get(RESTARTS_VARIABLE, "0") != "0"
    if requeued and (made := store.made_by(os.environ[JOB_VARIABLE])):
        return made, []  # a requeued job has the arguments of its first start, and is further than they say
    checkpoint = Path(resume)
    with group.raise_on_any_rank(), about("--resume"):
        read_state(checkpoint)
    problems = store.problems(checkpoint)
    if problems:
        raise UserError(f"--resume {checkpoint}: damaged ({problems[0]}); give another checkpoint, or 'auto'")
    return checkpoint, []


def allowed_changes(config: RunConfig) -> list[str]:
    """The keys that `--allow-change` takes: they move the weights differently from here on, and nothing that was saved
    loses its meaning.
    """
    return [
        *(f"optimizer.{name}" for name in OptimizerSection.model_fields if name != "type"),
        "run.rounds",
        "student.ema.decay",
        "student.ema.warmup",
        *(f"tasks.{name}.weight" for name in config.tasks),
        *(["anchor.weight"] if ANCHOR in config.all_teachers else []),
        *([] if config.learns_from_rewards else ["objective.extrapolation"]),
    ]


def refuse_other_changes(config: RunConfig, keys: tuple[str, ...]) -> None:
    """Raise UserError for a key that `--allow-change` does not take."""
    known = allowed_changes(config)
    for key in keys:
        if key not in known:
            raise UserError(
                f"--allow-change {key}: not possible in a run that goes on; possible are the keys of optimizer, "
                f"run.rounds, student.ema.decay and warmup, tasks.NAME.weight, anchor.weight and "
                f"objective.extrapolation.{nearest(key, known)}"
            )


def refuse_other_run(config: RunConfig, current: dict[str, Any], point: ResumePoint, allowed: tuple[str, ...]) -> None:
    """A resume must continue the same run: settings and files that decide its numbers have to be equal, but for what is
    `allowed`.

    Args:
        current: the identity of the run as it is configured now.

    Raises:
        UserError: naming the checkpoint, the first entry that differs, both values, and what to do.
    """
    theirs = (point.state["run"].get("ds_config") or {}).get("scheduler")
    if theirs and not current["ds_config"]["scheduler"] and "optimizer.schedule" not in allowed:
        raise UserError(
            f"resume from {point.checkpoint / STATE_FILE}: its learning rate followed DeepSpeed's {theirs['type']}, as "
            "optimizer.warmup_rounds and schedule did in earlier versions, and now it does not; accept it with "
            "--allow-change optimizer.schedule, or start a new run from its export with student.start"
        )
    for key, was, now in _differences(point.state["run"], current):
        if _OF_A_REWARD in key:
            continue
        if any(source in allowed for source in _sources(key)) and _keeps_copies(key, was, now):
            logging.getLogger("opd_ds").warning(
                "%s was %s and is now %s: accepted by --allow-change", _known_as(key), shown(was, 60), shown(now, 60)
            )
            continue
        raise UserError(_refusal(config, current, point, key, was, now))


def refuse_other_rewards(config: RunConfig, current: dict[str, Any], point: ResumePoint) -> None:
    """The same for what the rewards say of themselves once they are loaded."""
    for key, was, now in _differences(point.state["run"], current):
        if _OF_A_REWARD in key:
            raise UserError(_refusal(config, current, point, key, was, now))


def _refusal(config: RunConfig, current: dict[str, Any], point: ResumePoint, key: str, was: Any, now: Any) -> str:
    where = f"resume from {point.checkpoint / STATE_FILE}"
    fresh = "start a new run, in another run.output_dir, from this one's export with student.start"
    task = _task_of(key)
    if task and (task in point.state["run"]["tasks"]) != (task in current["tasks"]):
        what = "is new" if task in current["tasks"] else "is gone"
        return f"{where}: tasks.{task} {what}, and a run that goes on keeps its tasks; {fresh}"
    if key.endswith("sha256") and was and now:
        what = f"what lies at {_known_as(key)} is not what it was (SHA-256 {was[:12]}, now {now[:12]}); put it back"
    else:
        what = f"{_known_as(key)} was {shown(was, 60)} and is now {shown(now, 60)}; set it back"
    known = allowed_changes(config) if _keeps_copies(key, was, now) else []
    accepted = [source for source in _sources(key) if source in known]
    accept = f", accept it with --allow-change {accepted[-1]}" if accepted else ""
    return f"{where}: {what}{accept}, or {fresh}"


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    before, now = flat(_ABSENT | saved), flat(current)
    # The run config first: what the ds_config says mostly comes from it, and users set it there.
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key.startswith("ds_config."), key)):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def _known_as(key: str) -> str:
    """The key of the run config that an entry comes from."""
    section, _, last = key.rpartition(".")
    if last.startswith("teacher_"):
        owner = section if section == "anchor" else f"{section}.teacher"
        return f"{owner}.{last.removeprefix('teacher_').replace('sha256', 'path')}"
    if last == "prompts_sha256":
        return f"{section}.prompts"
    return _KEYS.get(key, key)


def _sources(key: str) -> list[str]:
    """The settings that decide an entry."""
    for prefix, names in _FILLED_FROM.items():
        if key.startswith(prefix):
            named = [name for name in names if key.removeprefix(prefix).startswith(name)] or list(names)
            return [f"optimizer.{name}" for name in named] + (["run.rounds"] if "scheduler" in prefix else [])
    return ["optimizer.schedule", key] if key == "run.rounds" else [_known_as(key)]


def _keeps_copies(key: str, was: Any, now: Any) -> bool:
    """An average that was never kept cannot go on."""
    return key != "student.ema.decay" or (was > 0) == (now > 0)


def _task_of(key: str) -> str | None:
    first, _, rest = key.partition(".")
    return rest.partition(".")[0] if first == "tasks" else None
