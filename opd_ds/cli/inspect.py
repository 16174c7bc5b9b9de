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
    base: Annotated[
        str | None,
        typer.Option(help="with --family: the run's base, which keys and shapes are checked against as `train` does"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Say what weights are, what of them is used or left out, and whether they can be loaded.

    The exit code is 1 if they cannot be named as a teacher, as a start or as a source of a merge, else 0; the last line
    says why, or what is not checked without --family or --base. Of networks only headers and configurations are read.
    """
    from opd_ds.models.inspection.report import report

    found = report(path, family, base)
    typer.echo(json.dumps(found.as_dict(), indent=1) if as_json else _text(found))
    if found.as_teacher.problem is not None:
        raise typer.Exit(1)


def _text(found: WeightsReport) -> str:
    role = "" if found.as_base is None else " as teacher"
    rows = [("kind", found.kind), *found.details.items()]
    rows += [(f"used{role}", name) for name in found.used] + [(f"not used{role}", name) for name in found.ignored]
    if found.as_base is not None:
        rows.append(("as base", str(found.as_base)))
    rows.append(("as teacher", str(found.as_teacher)))
    width = max(len(name) for name, _ in rows)
    return "\n".join([str(found.path), *(f"{name:{width}} {value}" for name, value in rows)])
