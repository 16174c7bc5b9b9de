"""`opd-ds data`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from opd_ds.cli.train import Config, Overrides, Recipe
from opd_ds.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Prompt sets: check them, make them, encode them ahead of a run.")


class Kind(StrEnum):
    geneval = "geneval"
    ocr = "ocr"


_ENDINGS = {Kind.geneval: ".jsonl", Kind.ocr: ".txt"}


@app.command()
def encode(
    recipe: Recipe = None,
    config: Config = None,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="folder; default: the run's model.text_cache")] = None,
) -> None:
    """Encode all prompts of a run, so that it starts with model.text_encoders=cached and loads no text encoder.

    What is encoded already stays; a call that was interrupted is continued by the next one.
    """
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import detect_world
    from opd_ds.config.loading import load_config

    world = detect_world()
    settings = load_config(recipe, config, overrides or [])
    prepare_environment(world)
    from opd_ds.engine import init_group
    from opd_ds.runs.encode import encode_prompts
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    with init_group(world) as group:
        encode_prompts(settings, group, output)


@app.command()
def generate(
    kind: Annotated[Kind, typer.Argument(help="geneval: objects with metadata; ocr: texts in quotes")],
    count: Annotated[int, typer.Option(min=1)],
    output: Annotated[Path, typer.Option(help="a .jsonl file for geneval, a .txt file for ocr")],
    seed: int = 0,
    without: Annotated[Path | None, typer.Option(help="a prompt file: none of its prompts occur")] = None,
) -> None:
    """Make a prompt set. The same kind, count, seed and --without give the same file."""
    from opd_ds.data import PromptSet
    from opd_ds.data.generators.compositions import as_lines, compositions
    from opd_ds.data.generators.lettering import lettering
    from opd_ds.utils.atomic_io import write_whole
    from opd_ds.utils.hashing import file_sha256

    if output.suffix != _ENDINGS[kind]:
        raise UserError(f"--output {output}: prompts of kind {kind.value} are a {_ENDINGS[kind]} file")
    avoided = frozenset(PromptSet.read(without, "--without").prompts) if without else frozenset()
    if kind is Kind.geneval:
        text = as_lines(compositions(count, seed, avoided))
    else:
        text = "".join(prompt + "\n" for prompt in lettering(count, seed, avoided))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, text)
    typer.echo(f"{output}: {count} prompts, sha256 {file_sha256(output)}")


@app.command()
def check(
    path: Annotated[str, typer.Argument(metavar="FILE", help="a prompt file, or a data set: folder or hub id")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="column=caption, where.task=ocr, split=train ...: as in a config")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Read a prompt set as a run would: counts, tags, repeats and the first problems, which make the exit status 1."""
    from opd_ds.config.loading import parse_prompts
    from opd_ds.data.check import as_dict, describe, look_through

    found = look_through(parse_prompts(path, overrides or []), "FILE")
    typer.echo(json.dumps(as_dict(found), indent=1) if as_json else describe(found))
    if found.problems:
        raise typer.Exit(1)
