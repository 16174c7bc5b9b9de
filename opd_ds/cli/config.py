"""`opd-ds config`."""

from __future__ import annotations

import json

import typer

app = typer.Typer(no_args_is_help=True, help="What a run config may say.")


@app.command()
def reference() -> None:
    """Print a page (Markdown) of every key: allowed values, default, meaning."""
    from opd_ds.config.reference import reference as page

    typer.echo(page(), nl=False)


@app.command()
def schema() -> None:
    """Print a JSON schema of config files, with which editors complete and check them."""
    from opd_ds.config.reference import editor_schema

    typer.echo(json.dumps(editor_schema(), indent=1))
