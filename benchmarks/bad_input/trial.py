"""One input given to its entry point, and whether the answer was a good one."""

from __future__ import annotations

import hashlib
import os
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.cluster.failures import message
from opd_ds.config.paths import package_root
from opd_ds.errors import COLUMNS, LINES, UserError

_BEGIN = "opd-ds: error: "
_HANDLED = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # `opd-ds train` takes the last three
_SECONDS = 30  # for one input; an answer takes a fraction of a second


class RefusedError(Exception):
    """An entry point's own way to say no, with what it says."""


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        inputs: descriptions of inputs.
        write: writes the files of one into an empty folder, which is the working folder.
        ask: hands it to an entry point. It returns, or raises UserError or RefusedError; the files stay as they are.
        known: inputs that people reported, and their like; always tried, first.
    """

    name: str
    inputs: SearchStrategy[Any]
    write: Callable[[Any, Path], None]
    ask: Callable[[Any, Path], None]
    known: tuple[Any, ...] = ()


@dataclass
class Tally:
    """How inputs of a kind were answered; `failed` has each distinct failure with its first input."""

    answers: Counter[str] = field(default_factory=Counter)
    failed: dict[str, Any] = field(default_factory=dict)


def command(arguments: Sequence[str]) -> None:
    """An `opd-ds` command in this process."""
    outcome = CliRunner().invoke(app, list(arguments))
    if isinstance(outcome.exception, SystemExit):
        raise RefusedError(outcome.output)
    if outcome.exception is not None:
        raise outcome.exception


def try_many(kind: Kind, count: int, number: int) -> Tally:
    """The known inputs of a kind and at most `count` others; the same `number` gives the same inputs."""
    tally = Tally()

    def one(described: Any) -> None:
        answer, reason = try_one(kind, described)
        tally.answers[answer] += 1
        if reason:
            tally.failed.setdefault(reason, described)

    for described in kind.known:
        one(described)

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.inputs)
    def all_of_them(described: Any) -> None:
        one(described)

    all_of_them()
    return tally


def try_one(kind: Kind, described: Any) -> tuple[str, str]:
    """`accepted`, `refused`, or `failed` with the reason: what a user must not see, or see happen."""
    # Below a folder of its own: an input may name the folder above.
    with tempfile.TemporaryDirectory(prefix="opd_ds_bad_input_") as name, _working_in(Path(name, "input")) as folder:
        kind.write(described, folder)
        before = _contents(folder)
        answer, reason = _asked(kind, described, folder)
        if not reason and _contents(folder) != before:
            reason = "files were changed"
    return ("failed" if reason else answer), reason


def _asked(kind: Kind, described: Any, folder: Path) -> tuple[str, str]:
    try:
        with _at_most(_SECONDS):
            kind.ask(described, folder)
    except UserError as error:
        long = [line for line in str(error).splitlines() if len(line) > LINES * COLUMNS - len(_BEGIN)]
        return "refused", _too_long(message(error)) or "".join(f"a problem is cut: {line}" for line in long)
    except RefusedError as error:
        return "refused", _too_long(str(error))
    except _TooSlowError:
        return "failed", f"no answer after {_SECONDS} s"
    except Exception as error:  # whatever it is, a user would see its traceback
        return "failed", _where(error)
    return "accepted", ""


class _TooSlowError(BaseException):
    """No `Exception`: nobody who catches all of them may take it for an answer."""


def _too_long(text: str) -> str:
    lines = sum(-(-len(line) // COLUMNS) for line in text.splitlines())
    return "" if lines <= LINES else f"{lines} lines of {COLUMNS} columns: {text[:60]}"


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(package_root())]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside"
    said = (str(error).splitlines() or [""])[0].replace(str(Path.cwd()), "")
    return f"{type(error).__name__} at {place}: {said[:100]}"


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
        for file in sorted(folder.rglob("*"))
    }


@contextmanager
def _working_in(folder: Path) -> Iterator[Path]:
    before = Path.cwd()
    folder.mkdir()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise _TooSlowError

    before = {number: signal.getsignal(number) for number in _HANDLED}
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
