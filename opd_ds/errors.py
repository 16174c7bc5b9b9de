"""Errors that are written for the person who started the run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

LINES, COLUMNS = 3, 120  # of a message on a terminal


class UserError(ValueError):
    """Something the user can fix. The message is one line: key, value, what is allowed, what to do."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm stopped being a finite number; the last checkpoint is intact."""


class IncompleteError(RuntimeError):
    """All is written, but a part of what was asked for could not be done; the message is one line."""


class DamagedCheckpointError(UserError):
    """A checkpoint is not what was written: a file is missing, cut off or changed."""


class Interrupted(SystemExit):
    """The run saved its state and left, after a signal; `code`, never 0, tells whether it wants to be started again."""

    code: int


@contextmanager
def about(what: str) -> Iterator[None]:
    """Errors for the user from inside begin with `what`, usually the key and its value."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def shown(value: object, length: int = 80) -> str:
    """`value` as a message quotes it: its `repr`, of which `length` characters stay, from both ends."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = f"a number of {type(value).__name__}"
    return shortened(text, length)


def shortened(text: str, length: int) -> str:
    """At most `length` characters of `text`, from both ends."""
    if len(text) <= length:
        return text
    kept = (length - 5) // 2
    return f"{text[:kept]} ... {text[-kept:]}"


def fitted(problems: Sequence[str], begin: str) -> str:
    """A message of at most three lines of 120 columns: as many problems as fit, one a line behind `begin`."""
    for count in range(len(problems), 0, -1):
        left = len(problems) - count
        lines = [*problems[:count], *([f"and {left} more"] if left else [])]
        if sum(-(-len(begin + line) // COLUMNS) for line in lines) <= LINES:
            return "\n".join(begin + line for line in lines)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return begin + shortened(problems[0], LINES * COLUMNS - len(begin + more)) + more


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`' Did you mean ...?'` for the closest allowed name, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
