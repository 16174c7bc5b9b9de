"""`opd-ds plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from opd_ds.cli.train import Config, Overrides, Recipe
from opd_ds.errors import UserError

Gpus = Annotated[str, typer.Option(help="devices to plan for, as 8xH100-80GB; 2xcpu for processes on a CPU")]
Fit = Annotated[str | None, typer.Option(help="devices, as for --gpus: search the fastest setting that fits on them")]
HostMemory = Annotated[
    str | None,
    typer.Option(help="GiB of a node's host memory, or `here` for this machine's; default: what the kind usually has"),
]
GpuPrice = Annotated[
    float | None,
    typer.Option(min=0, help="money for one GPU and hour; default: a round number in US dollars for the kind, assumed"),
]
Write = Annotated[Path | None, typer.Option(help="write the run with the recommended setting to this file")]
Json = Annotated[bool, typer.Option("--json", help="print one object, sizes in bytes")]


def plan(
    recipe: Recipe = None,
    config: Config = None,
    overrides: Overrides = None,
    gpus: Gpus = "8xH100-80GB",
    fit: Fit = None,
    host_memory: HostMemory = None,
    gpu_price: GpuPrice = None,
    write: Write = None,
    as_json: Json = False,
) -> None:
    """What a run will need: memory, passes and seconds a round, GPU hours and money; and the fastest setting that fits.

    Needs neither weights nor GPUs. Takes ten seconds to two minutes: the network's passes are measured without data.
    """
    from opd_ds.config.loading import load_config
    from opd_ds.plan.devices import parse_devices, parse_host_memory

    settings = load_config(recipe, config, overrides or [])
    host = parse_host_memory(host_memory, "--host-memory")
    devices = parse_devices(fit or gpus, "--fit" if fit else "--gpus", host)
    if write is not None and write.exists():
        raise UserError(f"--write {write}: is there already, and nothing is overwritten; give another name")

    from opd_ds.api import plan_run
    from opd_ds.plan import report

    found = plan_run(settings, devices)
    if fit is not None and found.recommended is None:
        raise UserError(found.problem)
    data = report.as_json(found, found.recommended if fit else found.configured, gpu_price)
    typer.echo(json.dumps(data, indent=1) if as_json else report.as_text(data))
    if write is not None:
        if found.setting is None:
            raise UserError(f"--write {write}: not written; {found.problem}")
        best = load_config(recipe, config, [*(overrides or []), *found.setting.overrides(settings)])
        write.write_text(report.as_config(best, str(devices)), encoding="utf-8")
        typer.echo(f"\nwritten to {write}", err=as_json)
