"""What long work says of itself: a bar on a terminal, elsewhere a line of the log every half minute.

Only who shows the log's information shows progress (`log_to_terminal`): rank 0 of a command, and nobody in a library.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 30.0
_AT_ONCE = 1.0  # what took less needs no line at its end
# Looks for sys.stdout whenever it prints; text in notebooks too, which would get a frame of HTML per line.
CONSOLE = Console(soft_wrap=True, force_jupyter=False)
_LOG = logging.getLogger("opd_ds")
_BARS = Progress(
    TextColumn("{task.description}"),
    BarColumn(bar_width=24),
    MofNCompleteColumn(),
    TextColumn("{task.fields[unit]}  {task.fields[status]}"),
    TimeRemainingColumn(),
    console=CONSOLE,
    transient=True,
)


class Work:
    """Something with a known number of steps that is going on."""

    def __init__(self, what: str, total: int, unit: str, bar: TaskID | None, done: int) -> None:
        self._what, self._total, self._unit, self._bar, self._done = what, total, unit, bar, done
        self._first = done
        self._began = self._last_line = time.monotonic()

    def advance(self, count: int = 1, status: str = "") -> None:
        """`count` more are done; `status` says how it goes."""
        self._done = min(self._done + count, self._total)
        now, ended = time.monotonic(), self._done == self._total
        if self._bar is not None:
            _BARS.update(self._bar, completed=self._done, status=status)
            if not ended:  # the bar goes away then, the line stays
                return
        if now - self._last_line < LINE_SECONDS if not ended else now - self._began < _AT_ONCE and not status:
            return
        self._last_line = now
        rest = (now - self._began) / (self._done - self._first) * (self._total - self._done)
        parts = [f"{self._what}: {self._done} of {self._total} {self._unit}", status]
        parts.append(f"in {duration(now - self._began)}" if ended else f"{duration(rest)} left")
        _LOG.info(", ".join(part for part in parts if part))


class _Silent(Work):
    def __init__(self) -> None:
        """Of nothing."""

    def advance(self, count: int = 1, status: str = "") -> None:
        """Nobody listens."""


@contextmanager
def work(what: str, total: int, unit: str, done: int = 0) -> Iterator[Work]:
    """Show the progress of what is done inside.

    Args:
        total: of `unit` (a plural: "images"), `done` of them at the beginning.
    """
    if not _LOG.isEnabledFor(logging.INFO):
        yield _Silent()
        return
    _LOG.info("%s: %d %s", what, total - done, unit)
    if not CONSOLE.file.isatty():  # rich also takes a notebook for a terminal
        yield Work(what, total, unit, None, done)
        return
    _BARS.start()
    bar = _BARS.add_task(what, total=total, completed=done, unit=unit, status="")
    try:
        yield Work(what, total, unit, bar, done)
    finally:
        _BARS.remove_task(bar)
        if not _BARS.task_ids:
            _BARS.stop()


def duration(seconds: float) -> str:
    """`45 s`, `12:05 min` or `3:20 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"
