"""`opd-ds rewards`: what is installed, what is missing, and a reward behind HTTP."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
import yaml

from opd_ds import TORCHVISION_PROBLEM
from opd_ds.errors import UserError
from opd_ds.rewards.base import SERVER, RewardUnavailableError
from opd_ds.rewards.registry import build, check, reward_class, reward_names

app = typer.Typer(no_args_is_help=True, help="Rewards: what is installed, which weights are found, a server.")


def _row(name: str) -> dict[str, Any]:
    """What `list` says about one reward; imports its module, which imports nothing heavy."""
    try:
        found = reward_class(name)
    except Exception as error:  # a third party's module may raise anything; the others are still listed
        return {"name": name, "judges": f"does not import: {type(error).__name__}: {error}", "installed": False}
    places = {weights.file or weights.folder: weights.find() for weights in found.needs.weights}
    return {
        "name": name,
        "judges": (found.__doc__ or "").strip().partition("\n")[0].partition(". ")[0].rstrip("."),
        "extra": found.needs.extra,
        "installed": not found.needs.absent_packages(),
        "weights": {file: str(place) if place else None for file, place in places.items()},
    }


@app.command("list")
def list_rewards(as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False) -> None:
    """Every reward: what it scores, its extra, whether that is installed, and which weights are found where."""
    rows = [_row(name) for name in reward_names()]
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
def check_rewards(names: Annotated[list[str], typer.Argument(help="rewards, see `opd-ds rewards list`")]) -> None:
    """One line per reward: ready, or what is missing and where it belongs. Exit code 1 when anything is missing."""
    ready = True
    for name in names:
        try:
            check(name)
            typer.echo(f"{name}: ready")
        except UserError as problem:
            ready = False
            typer.echo(f"{name}: {problem}")
    _say_torchvision()
    if not ready:
        raise typer.Exit(1)


@app.command()
def serve(
    name: Annotated[str, typer.Argument(help="the reward, see `opd-ds rewards list`")],
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
