"""`opd-ds inspect`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from opd_ds.models.inspection.report import WeightsReport


def inspect(
    path: Annotated[str, typer.Argument(help="what a config would name: a path, package:<path>, or a hub id")],
    family: Annotated[
        str | None, typer.Option(help="model family; with it a LoRA is read and converted, and every key checked")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Say what weights are, what of them is used or left out, and whether they can be loaded.

    The exit code is 0 if they can be named as a teacher, as a start or as a source of a merge, else 1; the last line
    says why. Of networks only headers and configurations are read.
    """
    from opd_ds.config.paths import resolve_path
    from opd_ds.models.inspection.report import report

    found = report(resolve_path(path, "PATH"), family)
    typer.echo(json.dumps(found.as_dict(), indent=1) if as_json else _text(found))
    if found.problem is not None:
        raise typer.Exit(1)


def _text(found: WeightsReport) -> str:
    rows = [("kind", found.kind), *found.details.items()]
    rows += [("used", name) for name in found.used] + [("not used", name) for name in found.ignored]
    if found.is_pipeline:
        rows.append(("as base", _verdict(found.base_problem)))
    rows.append(("as teacher", _verdict(found.problem)))
    return "\n".join([str(found.path), *(f"{name:12} {value}" for name, value in rows)])


def _verdict(problem: str | None) -> str:
    return "yes" if problem is None else f"no: {problem}"
