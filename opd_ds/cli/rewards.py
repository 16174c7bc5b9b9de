"""`opd-ds rewards`: what is installed, what is missing, and a reward behind HTTP."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
import yaml

from opd_ds import TORCHVISION_PROBLEM
from opd_ds.cli.train import Config, Overrides, Recipe
from opd_ds.errors import UserError
from opd_ds.rewards.base import SERVER, RewardUnavailableError
from opd_ds.rewards.registry import build, reward_names

Json = Annotated[bool, typer.Option("--json", help="for programs")]

app = typer.Typer(no_args_is_help=True, help="Rewards: what is installed, which weights are found, a server.")


@app.command("list")
def list_rewards(as_json: Json = False) -> None:
    """Every reward: what it scores, its extra, whether that is installed, and which weights are found where."""
    from opd_ds.rewards.needs import described

    rows = [described(name) for name in reward_names()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("reward", "scores", "extra", "installed", "weights")
    for row in rows:
        weights = [f"{file}: {place or 'not found'}" for file, place in row.get("weights", {}).items()]
        cells = [row["name"], row["judges"], row.get("extra") or "-", "yes" if row["installed"] else "no"]
        table.add_row(*cells, "\n".join(weights) or "-")
    Console().print(table)
    _say_torchvision()


@app.command("check")
def check_rewards(
    names: Annotated[
        list[str] | None, typer.Argument(help="rewards, see `opd-ds rewards list`, or FILE.py:NAME")
    ] = None,
    recipe: Recipe = None,
    config: Config = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Per reward: ready, or a line for each thing that is missing and where it belongs. Exit code 1 if anything is.

    Of the rewards that are named, or of all that the tasks and probes of a recipe or config need.
    """
    if bool(names) == bool(recipe or config):
        raise UserError("give names of rewards, or a run with --recipe or --config")
    from opd_ds.rewards.needs import reward_needs, run_needs

    if names:
        rows = [reward_needs(name) for name in names]
    else:
        from opd_ds.config.loading import load_config

        found = run_needs(load_config(recipe, config, overrides or []))
        rows = [{"reward": one.label, **asdict(one)} for one in found]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        _print_check(rows)
    if any(row["absent"] for row in rows):
        raise typer.Exit(1)


def _print_check(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        asked_by = f" ({', '.join(row['asked_by'])})" if row["asked_by"] else ""
        notes = [f"warning: {row['note']}; right if it needs that metadata"] if row["note"] else []
        for line in (row["absent"] or ["ready"]) + notes:
            typer.echo(f"{row['reward']}{asked_by}: {line}")
    if not rows:
        typer.echo("no rewards: this run needs none")
    _say_torchvision()


@app.command()
def serve(
    name: Annotated[str, typer.Argument(help="the reward, see `opd-ds rewards list`, or FILE.py:NAME")],
    port: int = 8000,
    host: Annotated[
        str, typer.Option(help="0.0.0.0 to be reached from other machines; there is no login")
    ] = "127.0.0.1",
    device: Annotated[str, typer.Option(help="where its network runs")] = "cpu",
    options: Annotated[list[str] | None, typer.Option("--option", help="key=value of the reward, repeatable")] = None,
) -> None:
    """Score over HTTP: POST /score, GET /health, GET /info. Other processes use the reward `remote`."""
    if SERVER.absent_packages():
        raise RewardUnavailableError(f"`opd-ds rewards serve` needs: pip install {SERVER.requirements()}")
    from opd_ds.rewards.server import serve as serve_reward

    reward = build(name, device=device, **dict(_option(text) for text in options or []))
    typer.echo(f"serving {name} at http://{host}:{port}")
    serve_reward(reward, host, port)


def _option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"--option {text!r}: expected key=value, for example --option batch_size=16")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--option {text!r}: the value is not valid YAML") from error


def _say_torchvision() -> None:
    if TORCHVISION_PROBLEM:
        typer.echo(f"torchvision: installed but does not load, treated as absent ({TORCHVISION_PROBLEM})")
