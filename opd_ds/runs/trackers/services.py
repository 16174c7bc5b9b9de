"""Trackers that are packages of their own, each an extra. All of them can work without a network.

accelerate's trackers cover the same packages. They are not used: they take no run id to go on with, two of the four
log no images, and their state object would start a process group beside the engine's (accelerate 1.15).

Nothing of the terminal is captured: what libraries print may hold what nobody wants to publish.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from PIL.Image import Image

from opd_ds.config.sections import TrackerSection
from opd_ds.runs.trackers.base import TrackedRun, Tracker


def _new_id() -> str:
    return uuid.uuid4().hex[:12]


class WandB(Tracker):
    """Weights & Biases. Offline: `trackers/wandb/` in the run folder, for `wandb sync`."""

    def __init__(self, section: TrackerSection, run: TrackedRun) -> None:
        import wandb

        run_id = run.known_id("wandb") or _new_id()
        (run.kept / "wandb").mkdir(parents=True, exist_ok=True)
        settings = {"console": "off", "silent": True, **section.options.get("settings", {})}
        self._image = wandb.Image
        self._run = wandb.init(
            project=section.project,
            dir=str(run.kept),
            id=run_id,
            resume="allow",
            mode="offline" if section.offline else None,  # None: as WANDB_MODE says
            config=run.parameters,
            **{"name": run.name} | section.options | {"settings": wandb.Settings(**settings)},
        )
        # Its own steps only grow; rewards of a round arrive later, and a resumed run goes some rounds back.
        self._run.define_metric("*", step_metric="round")
        run.keep_id("wandb", run_id)

    def scalars(self, values: Mapping[str, float], round_index: int) -> None:
        self._run.log({"round": round_index, **values})

    def image(self, tag: str, image: Image, round_index: int) -> None:
        self._run.log({"round": round_index, tag: self._image(image)})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio(Tracker):
    """trackio keeps all runs of a machine in one folder (`TRACKIO_DIR`), or in a Space (`options: {space_id: ...}`)."""

    def __init__(self, section: TrackerSection, run: TrackedRun) -> None:
        if section.offline:
            for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
                os.environ.pop(variable, None)
        import trackio

        # Runs are told apart by their names (trackio 0.43).
        name = run.known_id("trackio") or f"{run.name}-{_new_id()}"
        self._image = trackio.Image
        self._run = trackio.init(
            project=section.project,
            name=name,
            resume="allow",
            config=run.parameters,
            embed=False,
            **section.options,
        )
        run.keep_id("trackio", name)

    def scalars(self, values: Mapping[str, float], round_index: int) -> None:
        self._run.log(dict(values), step=round_index)

    def image(self, tag: str, image: Image, round_index: int) -> None:
        self._run.log({tag: self._image(image)}, step=round_index)

    def close(self, *, failed: bool) -> None:
        self._run.finish()


class SwanLab(Tracker):
    """SwanLab. Offline: `trackers/swanlab/` in the run folder, for `swanlab sync`."""

    def __init__(self, section: TrackerSection, run: TrackedRun) -> None:
        import swanlab

        run_id = run.known_id("swanlab") or _new_id()
        settings = {"terminal": {"proxy_type": "none"}, "interactive": False, **section.options.get("settings", {})}
        self._image = swanlab.Image
        self._run = swanlab.init(
            project=section.project,
            id=run_id,
            resume="allow",
            log_dir=str(run.kept / "swanlab"),
            mode="offline" if section.offline else None,
            config=run.parameters,
            **{"name": run.name} | section.options | {"settings": swanlab.Settings(**settings)},
        )
        run.keep_id("swanlab", run_id)

    def scalars(self, values: Mapping[str, float], round_index: int) -> None:
        self._run.log(dict(values), step=round_index)

    def image(self, tag: str, image: Image, round_index: int) -> None:
        self._run.log({tag: self._image(image)}, step=round_index)

    def close(self, *, failed: bool) -> None:
        self._run.finish(state="crashed" if failed else "success")


class MLflow(Tracker):
    """MLflow, at `MLFLOW_TRACKING_URI`. Offline: `trackers/mlflow.db` and `mlflow-artifacts/` in the run folder."""

    def __init__(self, section: TrackerSection, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        uri = artifacts = None
        if section.offline:
            run.kept.mkdir(exist_ok=True)
            uri = f"sqlite:///{(run.kept / 'mlflow.db').resolve()}"
            artifacts = (run.kept / "mlflow-artifacts").resolve().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        known = run.known_id("mlflow")
        if known is None:
            found = self._client.get_experiment_by_name(section.project)
            experiment = found.experiment_id if found else self._client.create_experiment(section.project, artifacts)
            created = self._client.create_run(experiment, **{"run_name": run.name} | section.options)
            parameters = [Param(key, str(value)[:_MLFLOW_LENGTH]) for key, value in _flat(run.parameters)]
            for first in range(0, len(parameters), _MLFLOW_PARAMETERS):
                chosen = parameters[first : first + _MLFLOW_PARAMETERS]
                self._client.log_batch(created.info.run_id, params=chosen)
            run.keep_id("mlflow", created.info.run_id)
        # A parameter cannot change, and a resumed run may have more rounds: the whole config is also a file.
        self._run_id = known or str(created.info.run_id)
        self._client.update_run(self._run_id, "RUNNING")
        self._client.log_dict(self._run_id, run.parameters, "parameters.yaml")

    def scalars(self, values: Mapping[str, float], round_index: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(key, value, now, round_index) for key, value in values.items()]
        for first in range(0, len(metrics), _MLFLOW_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + _MLFLOW_METRICS])

    def image(self, tag: str, image: Image, round_index: int) -> None:
        self._client.log_image(self._run_id, image, key=tag, step=round_index)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


# What MLflow's servers take (3.x): characters of a parameter, parameters and metrics of a request.
_MLFLOW_LENGTH, _MLFLOW_PARAMETERS, _MLFLOW_METRICS = 6000, 100, 1000


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` as `("a.b", 1)`."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
