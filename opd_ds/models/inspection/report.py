"""What `opd-ds inspect` says: an inspection, and how far the family and a base that are given bear it out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd_ds.config.paths import resolve_path
from opd_ds.errors import UserError, about
from opd_ds.models import FAMILIES, ModelFamily, family_class
from opd_ds.models.adapter_files import read_adapter
from opd_ds.models.inspection.fitting import check_weights
from opd_ds.models.inspection.inspector import Inspection, check_base, inspect


@dataclass(frozen=True)
class Verdict:
    """Whether weights can be named in a role; without `problem` and `unchecked` they can.

    Attributes:
        problem: why not.
        unchecked: what is still open, and what to give to have it checked.
    """

    problem: str | None = None
    unchecked: str | None = None

    def __str__(self) -> str:
        if self.problem is not None:
            return f"no: {self.problem}"
        return "yes" if self.unchecked is None else f"readable; {self.unchecked}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `ok` is null where something is unchecked."""
        sure = self.unchecked is None or self.problem is not None
        return {"ok": self.problem is None if sure else None, "problem": self.problem, "unchecked": self.unchecked}


@dataclass(frozen=True)
class WeightsReport:
    """An `Inspection` for people and programs; `as_base` is about pipelines only."""

    path: Path
    kind: str
    details: dict[str, str]
    used: list[str]
    ignored: list[str]
    as_base: Verdict | None
    as_teacher: Verdict

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        base = self.as_base or Verdict(f"a {self.kind}, no diffusers pipeline")
        return {
            "path": str(self.path),
            "kind": self.kind,
            "details": self.details,
            "used": self.used,
            "ignored": self.ignored,
            "as_base": base.as_dict(),
            "as_teacher": self.as_teacher.as_dict(),
        }


def report(name: str, family: str | None, base: str | None) -> WeightsReport:
    """Look at what `name` stands for.

    Args:
        family: name of the family that would load it; None: what holds for all.
        base: the model that it would be a teacher beside; None: keys and shapes are not compared.

    Raises:
        UserError: nothing is at `name`, an unknown family, or a base that is none.
    """
    if base is not None and family is None:
        raise UserError(f"--base = {base!r}: give --family too, the model family of the base")
    chosen = None if family is None else family_class(family)
    path = resolve_path(name, "PATH")
    model = None if base is None or chosen is None else _base(base, chosen)
    found = inspect(path)
    problem, details = found.problem, dict(found.details)
    try:
        if problem is None and found.is_adapter and chosen is not None:
            _, state = read_adapter(path, chosen.pipeline_class)
            details["modules"] = str(len(state) // 2)
        if problem is None and model is not None:
            check_weights(model, "tasks.NAME.teacher.path", name, path, str(base), trust_base=False)
    except UserError as error:
        problem = str(error)
    return WeightsReport(
        path,
        found.kind,
        details,
        [str(file.relative_to(path)) if path.is_dir() else file.name for file in found.files],
        list(found.ignored),
        _as_base(path, chosen) if found.is_pipeline else None,
        Verdict(problem, None if problem or model else _unchecked(found, chosen)),
    )


def _unchecked(found: Inspection, family: type[ModelFamily] | None) -> str:
    if family is not None:
        return "keys and shapes are checked against a base: give --base"
    if found.is_adapter:
        return f"which keys can be converted depends on the family: give --family ({', '.join(FAMILIES)}) and --base"
    return "keys and shapes are checked against a base: give --family and --base"


def _base(name: str, family: type[ModelFamily]) -> ModelFamily:
    path = resolve_path(name, "--base")
    with about(f"--base = {name!r}"):
        return _opened(path, family)


def _opened(path: Path, family: type[ModelFamily]) -> ModelFamily:
    check_base(path, family)
    return family(path, dtype=torch.float32, device=torch.device("cpu"))


def _as_base(path: Path, family: type[ModelFamily] | None) -> Verdict:
    try:
        if family is not None:
            _opened(path, family)
            return Verdict()
        check_base(path, None)
    except UserError as error:
        return Verdict(str(error))
    return Verdict(unchecked="whether it is of this family is checked with --family")
