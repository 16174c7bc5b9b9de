"""The models of `opd-ds eval`, by keyword or path, as plain networks: an evaluation needs no sharding."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opd_ds.checkpoint.export_student import EXPORT_FOLDER
from opd_ds.checkpoint.store import CHECKPOINTS_FOLDER, STATE_FILE, latest_checkpoint, read_state, refuse_damaged
from opd_ds.config.paths import resolve_path
from opd_ds.config.schema import RunConfig
from opd_ds.errors import UserError, about
from opd_ds.evaluation.benchmark import EvalModel
from opd_ds.evaluation.evaluator import student_guidance
from opd_ds.models import ModelFamily, lora
from opd_ds.models.inspection import inspect
from opd_ds.runs.export import checkpointed_student
from opd_ds.utils.hashing import weights_sha256

KEYWORDS = "base, student, teacher:<task>, checkpoint:<round>, checkpoint:latest"
_NAME = re.compile(r"[A-Za-z0-9_.:-]+")


@dataclass(frozen=True)
class Requests:
    """What the user asked for.

    Attributes:
        defaults: base, all teachers, and the student when the run has exported one.
        models: further ones, `name=keyword or path`, or a keyword alone.
        guidance: `name=value` where a model is not to be drawn with the student's guidance.
        raw: of checkpoints the weights themselves, not their average.
    """

    defaults: bool = True
    models: list[str] = field(default_factory=list)
    guidance: list[str] = field(default_factory=list)
    raw: bool = False


def contestants(
    config: RunConfig, family: ModelFamily, requests: Requests, sets: list[str], device: torch.device
) -> list[EvalModel]:
    """Find all requested models, in order, and hash them; networks load later, one at a time.

    Raises:
        UserError: an unknown keyword, nothing at a path, a name given twice, another architecture.
    """
    sources: dict[str, str] = {}
    if requests.defaults:
        keywords = ["base", *(f"teacher:{task}" for task in config.teachers)]
        if (config.run.output_dir / EXPORT_FOLDER).is_dir():
            keywords.append("student")
        sources = {keyword: keyword for keyword in keywords}
    for request in requests.models:
        name, separator, source = request.partition("=")
        if name in sources:
            raise UserError(f"--model {request}: there is a model {name!r} already; give another name")
        sources[name] = source if separator else name
    if not sources:
        raise UserError("no models to evaluate; give --model NAME=PATH, or leave out --no-defaults")
    folders: dict[str, str] = {}
    guidance = _guidance(requests.guidance, sources)
    models, any_raw = [], False
    for name, source in sources.items():
        if not _NAME.fullmatch(name):
            raise UserError(f"--model {name}={source}: a name may hold letters, digits, '_', '.', ':' and '-' only")
        path = _find(config, name, source)
        with about(f"--model {name}={source}"):
            load, raw = _loader(family, path, raw=requests.raw)
        any_raw = any_raw or raw
        by_set = student_guidance(config, sets)
        if source.startswith("teacher:"):
            by_set = dict.fromkeys(sets, config.teachers[source.removeprefix("teacher:")].guidance)
        if name in guidance:
            by_set = dict.fromkeys(sets, guidance[name])
        sha256 = weights_sha256(path)
        identity = hashlib.sha256(f"raw {sha256}".encode()).hexdigest() if raw else sha256
        model = EvalModel(name, identity, by_set, partial(_loaded, load, device))
        if model.folder in folders:
            raise UserError(f"models {folders[model.folder]!r} and {name!r} would share a folder; rename one")
        folders[model.folder] = name
        models.append(model)
    if requests.raw and not any_raw:
        raise UserError(
            "--raw: no model is a checkpoint that keeps an average beside its weights; give --model checkpoint:latest"
        )
    return models


def _guidance(requests: list[str], known: dict[str, str]) -> dict[str, float]:
    values = {}
    for request in requests:
        name, _, text = request.partition("=")
        if name not in known:
            raise UserError(f"--guidance {request}: no such model; there are {', '.join(known)}")
        try:
            values[name] = float(text)
        except ValueError:
            raise UserError(f"--guidance {request}: expected NAME=NUMBER, for example teacher:text=1.0") from None
    return values


def _find(config: RunConfig, name: str, source: str) -> Path:
    """The file or folder behind a keyword or path."""
    kind, _, which = source.partition(":")
    run = config.run.output_dir
    if source == "base":
        return resolve_path(config.model.path, "model.path")
    if source == "student":
        if not (run / EXPORT_FOLDER).is_dir():
            raise UserError(f"--model {name}={source}: {run / EXPORT_FOLDER} does not exist; has the run finished?")
        return run / EXPORT_FOLDER
    if kind == "teacher":
        if which not in config.teachers:
            there = ", ".join(config.teachers) or "no teachers in this run"
            raise UserError(f"--model {name}={source}: no such task; there are {there}")
        return resolve_path(config.teachers[which].path, f"tasks.{which}.teacher.path")
    if kind == "checkpoint":
        return _find_checkpoint(run / CHECKPOINTS_FOLDER, name, which)
    try:
        return resolve_path(source, f"--model {name}")
    except UserError as error:
        raise UserError(f"{error}; or one of {KEYWORDS}") from error


def _find_checkpoint(folder: Path, name: str, which: str) -> Path:
    found = latest_checkpoint(folder) if which == "latest" else folder / f"round-{which.zfill(6)}"
    if found is None or not (found / STATE_FILE).is_file():
        present = ", ".join(path.name for path in sorted(folder.glob("round-*"))) or "no checkpoints"
        raise UserError(f"--model {name}=checkpoint:{which}: not in {folder}; there are {present}")
    return found


# ---- loading ----


@contextmanager
def _loaded(load: Callable[[], nn.Module], device: torch.device) -> Iterator[Any]:
    network = load().requires_grad_(False).eval().to(device)
    yield network
    network.to("meta")  # whoever still holds it holds no memory


def _loader(family: ModelFamily, path: Path, *, raw: bool) -> tuple[Callable[[], nn.Module], bool]:
    """How the network at `path` is brought up, and whether that takes raw weights where there is an average; what it is
    gets checked now.
    """
    if (path / STATE_FILE).is_file():
        refuse_damaged(path)
        raw = raw and "ema" in read_state(path)["copies"]
        return partial(checkpointed_student, family, path, averaged=not raw), raw
    found = inspect(path)
    found.refuse_problem()
    if found.is_adapter:
        family.check_adapter(path)
        return partial(_with_adapter, family, path), False
    family.check_compatible(path)
    return partial(family.load_transformer, path), False


def _with_adapter(family: ModelFamily, path: Path) -> nn.Module:
    network = family.load_transformer()
    lora.load_adapter(network, "evaluated", path, family.pipeline_class)
    lora.activate(network, "evaluated")
    return network
