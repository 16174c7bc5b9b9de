"""Where people look at runs: TensorBoard, Weights & Biases, trackio, SwanLab, MLflow, behind one small interface."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from opd_ds.config.sections import TrackerSection
from opd_ds.errors import UserError, nearest
from opd_ds.runs.trackers.background import BackgroundTracker
from opd_ds.runs.trackers.base import TrackedRun, Tracker
from opd_ds.runs.trackers.repeats import WithoutRepeats

__all__ = ["BackgroundTracker", "TrackedRun", "Tracker", "check_trackers", "open_trackers", "places"]


@dataclass(frozen=True)
class _Known:
    """One of the trackers.

    Attributes:
        tracker: "module:Class", imported when a run starts.
        takes: "module:callable" whose further arguments `options` may name.
        given: those that are ours.
        look: the command that shows the run; `look_offline` where the tracker is offline.
        needs: further modules.
        forgets: a resumed run can make it forget the rounds after the checkpoint.
    """

    tracker: str
    takes: str
    given: frozenset[str]
    look: str
    look_offline: str
    needs: tuple[str, ...] = ()
    forgets: bool = False


_OURS = frozenset({"project", "id", "resume", "mode", "dir", "log_dir", "config"})
_KNOWN = {
    "tensorboard": _Known(
        "opd_ds.runs.trackers.tensorboard:TensorBoard",
        "torch.utils.tensorboard:SummaryWriter",
        frozenset({"log_dir", "purge_step"}),
        "tensorboard --logdir {folder}/tensorboard",
        "tensorboard --logdir {folder}/tensorboard",
        forgets=True,
    ),
    "wandb": _Known(
        "opd_ds.runs.trackers.services:WandB",
        "wandb:init",
        _OURS,
        "project {project} at wandb.ai, or where WANDB_BASE_URL says",
        "wandb sync {folder}/trackers/wandb/offline-run-*",
    ),
    "trackio": _Known(
        "opd_ds.runs.trackers.services:Trackio",
        "trackio:init",
        _OURS | {"name", "embed"},
        "trackio show --project {project}",
        "trackio show --project {project}",
    ),
    "swanlab": _Known(
        "opd_ds.runs.trackers.services:SwanLab",
        "swanlab:init",
        _OURS | {"kwargs"},
        "project {project} at swanlab.cn, or where SWANLAB_WEB_HOST says",
        "swanlab sync {folder}/trackers/swanlab/run-*",
    ),
    "mlflow": _Known(
        "opd_ds.runs.trackers.services:MLflow",
        "mlflow:MlflowClient.create_run",
        frozenset({"self", "experiment_id"}),
        "experiment {project} at MLFLOW_TRACKING_URI",
        "mlflow ui --backend-store-uri sqlite:///{folder}/trackers/mlflow.db",
        needs=("alembic", "sqlalchemy"),
    ),
}


def check_trackers(sections: Iterable[TrackerSection]) -> None:
    """Raise UserError where a tracker's package is missing, does not load, or knows no such option."""
    for section in sections:
        known = _KNOWN[section.name]
        module, _, place = known.takes.partition(":")
        try:
            taken: Any
            taken, *_ = [import_module(name) for name in (module, *known.needs)]
        except ModuleNotFoundError as error:
            raise UserError(
                f"trackers: {section.name} needs the package {error.name!r}: pip install 'opd-ds[{section.name}]', or "
                f"take {section.name} out of `trackers`"
            ) from error
        for part in place.split("."):
            taken = getattr(taken, part)
        allowed = sorted(set(inspect.signature(taken).parameters) - known.given)
        for option in section.options:
            if option not in allowed:
                raise UserError(
                    f"trackers: {section.name}.options: {option!r} is not one of {', '.join(allowed)}."
                    f"{nearest(option, allowed)}"
                )


def open_trackers(sections: Iterable[TrackerSection], run: TrackedRun) -> list[BackgroundTracker]:
    """Start them; each opens in a thread of its own, so that this returns at once."""

    def start(section: TrackerSection) -> Tracker:
        known = _KNOWN[section.name]
        module, _, name = known.tracker.partition(":")
        goes_on = run.known_id(section.name) is not None
        tracker: Tracker = getattr(import_module(module), name)(section, run)
        return (
            tracker if known.forgets else WithoutRepeats(tracker, run.kept / f"{section.name}.records", goes_on=goes_on)
        )

    return [BackgroundTracker(section.name, partial(start, section)) for section in sections]


def places(sections: Iterable[TrackerSection], folder: Path) -> dict[str, str]:
    """By tracker, where to look at the run whose `run.output_dir` is `folder`."""
    return {
        section.name: (_KNOWN[section.name].look_offline if section.offline else _KNOWN[section.name].look).format(
            folder=folder, project=section.project
        )
        for section in sections
    }
