"""Commands that measure rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def reward_table(
    folder: Annotated[Path, typer.Option(help="where the environments are made; those that exist are used again")],
    output: Annotated[Path, typer.Option(help="the table, in Markdown")],
    constraint: Annotated[
        list[str] | None,
        typer.Option(help="of pip, repeatable; without a GPU, torch==2.13.0 keeps the CPU build"),
    ] = None,
) -> None:
    """What does each reward need, alone in an environment with the core and its extra, and what does it say?"""
    from benchmarks.rewards.table import bench

    table = bench(folder, constraint or [], typer.echo)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(table, encoding="utf-8")


def ocr_accuracy(
    output: Annotated[Path | None, typer.Option(help="a file for the JSON that is printed")] = None,
    count: Annotated[int, typer.Option(min=1, help="images on each ground")] = 200,
    workers: Annotated[list[int] | None, typer.Option(help="of the reward, repeatable; default: 1 and 2")] = None,
    seed: Annotated[int, typer.Option(help="of what is drawn")] = 0,
) -> None:
    """How well, and how fast, does the OCR reward read drawn text?"""
    from benchmarks.rewards.ocr_accuracy import bench

    text = json.dumps(bench(count, workers or (1, 2), seed), indent=1)
    typer.echo(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
