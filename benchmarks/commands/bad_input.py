"""The command that counts how bad input is answered."""

from __future__ import annotations

from typing import Annotated

import typer


def bad_input(
    count: Annotated[int, typer.Option(min=1, help="inputs of each kind, at most")] = 200,
    seed: Annotated[int, typer.Option(help="another one gives other inputs")] = 0,
    kind: Annotated[list[str] | None, typer.Option(help="only this one, repeatable; default: all")] = None,
) -> None:
    """Is every bad input accepted or refused in one clear line? Exit code 1 where one is not."""
    from benchmarks.bad_input.kinds import KINDS
    from benchmarks.bad_input.report import count_answers

    chosen = {name: KINDS[name] for name in kind} if kind else KINDS
    if not count_answers(chosen, count, seed, typer.echo):
        raise typer.Exit(1)
