"""`opd-ds eval`."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

Repeated = list[str] | None


def evaluate(
    recipe: Annotated[str | None, typer.Option(help="a shipped recipe, see `opd-ds recipes`")] = None,
    config: Annotated[Path | None, typer.Option(help="your own YAML run config, or a run's config.yaml")] = None,
    overrides: Annotated[Repeated, typer.Option("--set", help="key.path=value, repeatable")] = None,
    models: Annotated[
        Repeated,
        typer.Option(
            "--model",
            help="NAME=SOURCE, repeatable: a path or hub id (diffusers folder, LoRA, checkpoint round-NNNNNN), "
            "or base, student, teacher:TASK, checkpoint:ROUND, checkpoint:latest",
        ),
    ] = None,
    defaults: Annotated[
        bool, typer.Option(help="base, all teachers and the exported student besides those of --model")
    ] = True,
    guidance: Annotated[
        Repeated, typer.Option(help="NAME=VALUE where a model is not drawn with the student's guidance, repeatable")
    ] = None,
    prompts: Annotated[
        Repeated,
        typer.Option(
            help="NAME=FILE, repeatable: sets besides the tasks' eval_prompts; or NAME={path: FILE, column: caption, "
            "unique: true, limit: 100, where: {task: ocr}}, with keys as in a config"
        ),
    ] = None,
    rewards: Annotated[
        Repeated, typer.Option("--reward", help="name or label, repeatable: instead of the tasks' rewards")
    ] = None,
    samples_per_prompt: Annotated[int | None, typer.Option(min=1, help="default: the config's")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N prompts of each set")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="of checkpoints the weights, not their average")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="folder for images, scores and results; default: eval in run.output_dir, or eval-2, eval-3 ... where "
            "that holds another evaluation"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="two results.json, each optionally with #MODEL: which differences are significant?"),
    ] = None,
) -> None:
    """Draw, score and compare models: results.json, tables and report.html in a folder of their own."""
    if compare is not None:
        _compare(compare, as_json=as_json)
        return
    from opd_ds.config.loading import load_config

    overrides = list(overrides or [])
    if samples_per_prompt is not None:
        overrides.append(f"evaluation.samples_per_prompt={samples_per_prompt}")
    settings = load_config(recipe, config, overrides)

    from opd_ds.api import evaluate as run_evaluation
    from opd_ds.runs.evaluate import Choice, show_table
    from opd_ds.runs.model_specs import Requests

    choice = Choice(Requests(defaults, models or [], guidance or [], raw), prompts or [], rewards or [], limit, output)
    show = partial(_show_json, sys.stdout) if as_json else show_table
    with redirect_stdout(sys.stderr if as_json else sys.stdout):  # libraries print while they start
        run_evaluation(settings, choice, show)


def _compare(files: tuple[str, str], *, as_json: bool) -> None:
    from opd_ds.evaluation.compare import as_dict, compare_files, print_differences

    differences, notes = compare_files(*files)
    if as_json:
        typer.echo(json.dumps(as_dict(differences, notes), indent=1))
    else:
        print_differences(differences, notes)


def _show_json(stream: TextIO, results: dict[str, Any], folder: Path) -> None:
    from opd_ds.evaluation.results import as_summary

    print(json.dumps(as_summary(results, folder), indent=1), file=stream)
