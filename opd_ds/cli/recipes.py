"""`opd-ds recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opd_ds.errors import UserError

app = typer.Typer(help="The shipped recipes: list them, show one, copy one to begin from.")

Name = Annotated[str, typer.Argument(help="as `opd-ds recipes` lists it")]


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is None:
        list_recipes()


@app.command("list")
def list_recipes() -> None:
    """The same: every shipped recipe and what it is."""
    from opd_ds.config.files import recipe_header, recipe_names

    for name in recipe_names():
        typer.echo(f"{name:27} {recipe_header(name)[0].lstrip('# ')}")


@app.command()
def show(name: Name) -> None:
    """Print a recipe with all its keys, defaults too, and what they mean."""
    from opd_ds.config.commented import commented_recipe

    typer.echo(commented_recipe(name), nl=False)


@app.command()
def copy(name: Name, file: Annotated[Path, typer.Argument(help="a new YAML file")]) -> None:
    """Write a recipe to a file of your own, as `show` prints it; the file loads as the same config."""
    from opd_ds.config.commented import commented_recipe
    from opd_ds.utils.atomic_io import write_whole

    text = commented_recipe(name)
    if file.exists():
        raise UserError(f"{file} exists; a copy never overwrites: give another name or remove it")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)
    typer.echo(f"{file}: edit it, then `opd-ds train --config {file} --dry-run`")
