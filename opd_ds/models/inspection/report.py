"""What `opd-ds inspect` says, with the family's own reading of a LoRA where the family is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ds.errors import UserError
from opd_ds.models import ModelFamily, family_class
from opd_ds.models.adapter_files import read_adapter
from opd_ds.models.inspection.inspector import Inspection, check_base, inspect


@dataclass(frozen=True)
class WeightsReport:
    """An `Inspection` for people and programs; `base_problem`: why a pipeline cannot be `model.path`."""

    path: Path
    kind: str
    details: dict[str, str]
    used: list[str]
    ignored: list[str]
    is_pipeline: bool
    problem: str | None
    base_problem: str | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "details": self.details,
            "used": self.used,
            "ignored": self.ignored,
            "as_base": {"ok": self.is_pipeline and self.base_problem is None, "problem": self.base_problem},
            "as_teacher": {"ok": self.problem is None, "problem": self.problem},
        }


def report(path: Path, family: str | None) -> WeightsReport:
    """Look at what is at `path`.

    Args:
        family: name of the family that would load it; None: what holds for all.

    Raises:
        UserError: an unknown family.
    """
    chosen = None if family is None else family_class(family)
    found = inspect(path)
    problem, details = found.problem, dict(found.details)
    if problem is None and found.is_adapter and chosen is not None:
        try:
            _, state = read_adapter(path, chosen.pipeline_class)
            details["modules"] = str(len(state) // 2)
        except UserError as error:
            problem = str(error)
    base_problem = _base_problem(found, chosen) if found.is_pipeline else None
    used = [str(file.relative_to(path)) if path.is_dir() else file.name for file in found.files]
    return WeightsReport(path, found.kind, details, used, list(found.ignored), found.is_pipeline, problem, base_problem)


def _base_problem(found: Inspection, family: type[ModelFamily] | None) -> str | None:
    if family is None:
        return next((part.problem for part in found.parts if part.problem is not None), None)
    try:
        check_base(found.path, family)
    except UserError as error:
        return str(error)
    return None
