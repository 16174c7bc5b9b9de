"""`opd-ds eval`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from opd_ds.cluster.rendezvous import prepare_environment
from opd_ds.cluster.world import detect_world

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
        Repeated, typer.Option(help="NAME=FILE, repeatable: sets besides the tasks' eval_prompts")
    ] = None,
    rewards: Annotated[
        Repeated, typer.Option("--reward", help="name or label, repeatable: instead of the tasks' rewards")
    ] = None,
    samples_per_prompt: Annotated[int | None, typer.Option(min=1, help="default: the config's")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N prompts of each set")] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="two results.json, each optionally with #MODEL: which differences are significant?"),
    ] = None,
) -> None:
    """Draw, score and compare models: <run.output_dir>/eval/results.json, tables and report.html."""
    if compare is not None:
        from opd_ds.evaluation.compare import compare_files

        compare_files(*compare)
        return
    from opd_ds.config.loading import load_config

    world = detect_world()
    overrides = list(overrides or [])
    if samples_per_prompt is not None:
        overrides.append(f"evaluation.samples_per_prompt={samples_per_prompt}")
    settings = load_config(recipe, config, overrides)
    prepare_environment(world)

    from opd_ds.engine import init_group
    from opd_ds.runs.evaluate import Choice
    from opd_ds.runs.evaluate import evaluate as run_evaluation
    from opd_ds.runs.model_specs import Requests
    from opd_ds.utils.logging import log_to_terminal, quiet_libraries

    quiet_libraries()
    log_to_terminal(world.rank)
    requests = Requests(defaults, models or [], guidance or [])
    timeout = timedelta(minutes=settings.run.hang_minutes + 10)
    with init_group(world, timeout, deterministic=settings.run.deterministic) as group:
        run_evaluation(settings, Choice(requests, prompts or [], rewards or [], limit), group)
