"""`opd-ds plan`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from opd_ds.cli.train import Config, Overrides, Recipe

Gpus = Annotated[str, typer.Option(help="devices to plan for, as 8xH100-80GB; 2xcpu for processes on a CPU")]
Fit = Annotated[str | None, typer.Option(help="devices, as for --gpus: search the fastest setting that fits on them")]
Json = Annotated[bool, typer.Option("--json", help="print one object, sizes in bytes")]


def plan(
    recipe: Recipe = None,
    config: Config = None,
    overrides: Overrides = None,
    gpus: Gpus = "8xH100-80GB",
    fit: Fit = None,
    as_json: Json = False,
) -> None:
    """What a run will need: memory by part, passes and seconds a round. Needs neither weights nor GPUs.

    Takes a minute or more: the network's passes are measured without data.
    """
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import World
    from opd_ds.config.loading import load_config
    from opd_ds.plan.devices import parse_devices

    settings = load_config(recipe, config, overrides or [])
    devices = parse_devices(gpus, "--gpus") if fit is None else parse_devices(fit, "--fit")
    prepare_environment(World())

    from opd_ds.errors import UserError
    from opd_ds.plan import planner, report
    from opd_ds.plan.costs import Costs
    from opd_ds.plan.network import find_model
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    costs = Costs(find_model(settings), settings)
    problem = setting = None
    try:
        setting, found = planner.fit(settings, costs, devices)
    except UserError as error:
        if fit is not None:
            raise
        problem = str(error)
    if fit is None:
        found = planner.make_plan(settings, costs, devices)
    data = report.as_json(found, costs, setting)
    if as_json:
        typer.echo(json.dumps(data, indent=1))
        return
    typer.echo(report.as_text(data))
    typer.echo(f"\n# {'the plan above' if fit else 'recommended'}: the fastest setting that fits on {devices}")
    if setting is None:
        typer.echo(problem)
        return
    typer.echo(" \\\n".join(f"  --set {line}" for line in setting.overrides(settings)))
