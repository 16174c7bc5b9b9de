"""Signals that ask a run to stop: noticed at once, even inside a collective, acted on between rounds.

SIGUSR1 (SLURM, ahead of the time limit or of preemption) means: save and ask to be started again. SIGTERM and SIGINT
mean: save and leave. The round in progress is finished: nothing of it is lost, and the state is that of a whole round.
A run that left early never exits with 0, or what depends on the whole run would start.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Set
from types import FrameType
from typing import Any, Protocol

RESTART = 75  # exit code; EX_TEMPFAIL of sysexits.h: "try again"
# Launchers repeat a signal: the scheduler sends it to every process, a parent passes it on.
SAME_REQUEST_SECONDS = 3.0
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Gathers(Protocol):
    """All ranks of a run, as far as signals need them: `opd_ds.engine.Group`, which lies above this package."""

    def gather(self, value: Any) -> list[Any]: ...


class StopRequest:
    """What this process has been asked to do. A second signal, some seconds after the first, ends it at once."""

    def __init__(self) -> None:
        self._asked: frozenset[int] = frozenset()  # replaced, not changed: two threads look at it
        self._first = 0.0
        self._ended = False
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Python runs a handler only when its main thread is back from C++, which a hanging collective never is. The
        # number goes through a pipe to a thread instead; the handlers do nothing but keep the default from happening.
        for number in _SIGNALS:
            signal.signal(number, _ignore)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()

    def _listen(self, reader: int) -> None:
        while numbers := os.read(reader, 16):
            for number in numbers:
                if number in _SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        if self._ended:
            return
        now = time.monotonic()
        if self._asked and now - self._first > SAME_REQUEST_SECONDS:
            os._exit(128 + number)  # what is being written has no name yet: nothing is damaged
        if not self._asked:
            self._first = now
        self._asked |= {number}

    def ignore(self) -> None:
        """From here on signals change nothing."""
        self._ended = True

    def agreed(self, group: Gathers) -> int | None:
        """The exit code all ranks are to leave with if any of them was asked to stop, else None: 75 after SIGUSR1, 143
        after SIGTERM, 130 after SIGINT. Collective.
        """
        return _exit_code({number for numbers in group.gather(self._asked) for number in numbers})

    def alone(self) -> int | None:
        """The same for this process alone, while it cannot ask the others yet."""
        return _exit_code(self._asked)


def _exit_code(asked: Set[int]) -> int | None:
    if not asked:
        return None
    return RESTART if signal.SIGUSR1 in asked else 128 + max(asked)


def _in_main_thread() -> bool:
    """Python installs signal handlers in no other thread."""
    return threading.current_thread() is threading.main_thread()


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


_request: StopRequest | None = None


def listen() -> StopRequest:
    """This process's stop request; handlers are installed at the first call, which must be in the main thread."""
    global _request
    if _request is None:
        _request = StopRequest()
    return _request


def exit_code_asked_for() -> int | None:
    """The exit code to leave with if this process was asked to stop; None where nobody listens to signals."""
    return _request.alone() if _request is not None else None


def ignore_signals() -> None:
    """From here on signals change nothing: what is to be saved is saved, and the process is about to end.

    Launchers and SLURM send SIGTERM to the other ranks as soon as the first is gone; a rank that dies of it would hide
    the exit code on which they agreed.
    """
    if _request is not None:
        _request.ignore()
    if _in_main_thread():
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def exit_code_on_sigterm(code: int) -> None:
    """From here on SIGTERM ends the process with this exit code, and in silence. Only the main thread can say so."""
    if not _in_main_thread():
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
