"""`python -m tools.reference_parity env|parity NAME`, from a checkout."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from opd_ds.errors import UserError
from opd_ds.rewards.base import SERVER, require_packages
from tools.reference_parity.environment import build

_Name = Annotated[str, typer.Argument(help="deqa, hpsv2x, hpsv3, image-reward, mmdet or paddleocr")]
_Folder = Annotated[Path | None, typer.Option(help="of the environment; default ~/.cache/opd_ds/envs/NAME")]


def env(
    name: _Name,
    folder: _Folder = None,
    serve: Annotated[int | None, typer.Option(help="then serve the library on 127.0.0.1 at this port")] = None,
    weights: Annotated[Path | None, typer.Option(help="with --serve: the published checkpoint")] = None,
) -> None:
    """Build the isolated environment of a reference library, and serve it if asked to."""
    if (serve is None) != (weights is None):
        raise UserError("--serve PORT and --weights FILE belong together")
    if serve is not None:
        require_packages(name, SERVER)
    environment = build(name, folder)
    typer.echo(f"{name}: ready in {environment.folder}")
    if serve is not None and weights is not None:
        from opd_ds.rewards.server import serve as serve_reward
        from tools.reference_parity.reward import ReferenceReward

        with closing(ReferenceReward(environment, weights)) as reward:
            typer.echo(f"serving {name} at http://127.0.0.1:{serve}")
            serve_reward(reward, "127.0.0.1", serve)


def parity(
    name: _Name,
    weights: Annotated[Path | None, typer.Option(help="a published checkpoint; default: random weights")] = None,
    pictures: Annotated[Path | None, typer.Option(help="a folder, file names are the prompts; default: drawn")] = None,
    folder: _Folder = None,
    tolerance: Annotated[float, typer.Option(help="largest difference, relative to values above 1")] = 1e-4,
) -> None:
    """Compare our scorer with the reference library on the same images and weights; exit code 1 if they differ."""
    from rich.console import Console

    from opd_ds.utils.logging import quiet_libraries
    from tools.reference_parity.ours import OURS
    from tools.reference_parity.parity import parity as compared
    from tools.reference_parity.parity import print_rows

    if name not in OURS:
        raise UserError(f"parity {name!r}: nothing to compare; allowed: {', '.join(OURS)}")
    quiet_libraries()
    rows = compared(build(name, folder), OURS[name], weights, pictures)
    print_rows(
        Console(), f"{name} and opd_ds, {'random weights' if weights is None else weights.name}", rows, tolerance
    )
    if not all(row.within(tolerance) for row in rows):
        raise typer.Exit(1)


app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.command("env")(env)
app.command("parity")(parity)

if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        sys.exit(f"error: {error}")
