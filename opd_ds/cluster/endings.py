"""No process ends as if it had succeeded before its work is done, whatever a library does."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from opd_ds.cluster.failures import report_and_exit


class EndedEarlyError(RuntimeError):
    """A library ended the process, or one of its threads, before the command was done."""


_exit_now = os._exit


def end_now(code: int) -> NoReturn:
    """End a command that is done although a thread of it hangs, which would keep the interpreter from ending."""
    sys.stdout.flush()
    sys.stderr.flush()
    _exit_now(code)


@contextmanager
def no_silent_end() -> Iterator[None]:
    """Inside, `os._exit(0)` and an exception that ends a thread end this process with a message and a code other
    than 0, on all ranks of the run.

    Python (3.11) only prints the exception that ends a thread, and is silent where it is a SystemExit; what the thread
    did for the run (heartbeats, signals, writing) is not done any more. Processes that this one forks may use
    `os._exit(0)`, as multiprocessing does. `exit(0)` is a SystemExit: see `opd_ds.cli.main`.
    """
    thread_hook, process = threading.excepthook, os.getpid()

    def checked_exit(status: int) -> NoReturn:
        if status == 0 and os.getpid() == process:
            caller = sys._getframe(1)
            place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
            report_and_exit(EndedEarlyError(f"os._exit(0) was called at {place}, before the command was done"))
        _exit_now(status)

    def report_thread(died: threading.ExceptHookArgs) -> None:
        name = died.thread.name if died.thread is not None else "without a name"
        error = EndedEarlyError(f"thread {name!r} ended before the command was done: {died.exc_value!r}")
        error.__cause__ = died.exc_value
        report_and_exit(error)

    os._exit, threading.excepthook = checked_exit, report_thread
    try:
        yield
    finally:
        os._exit, threading.excepthook = _exit_now, thread_hook
