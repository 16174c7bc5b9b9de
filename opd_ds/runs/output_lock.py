"""One run at a time writes `run.output_dir`. The lock is the operating system's, which drops it with the process."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from opd_ds.cluster.world import JOB_VARIABLE
from opd_ds.errors import UserError

LOCK_FILE = "run.lock"
PATIENCE = 30.0  # seconds that the processes of a run that was killed may need to end
_NO_LOCKS_HERE = {errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}


class OutputLock:
    """What rank 0 holds until its run ends. Nothing is held before `take`.

    Args:
        patience: seconds to wait for another run that holds it.
    """

    def __init__(self, patience: float) -> None:
        self._patience, self._held = patience, ExitStack()

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._held.close()

    def take(self, folder: Path) -> None:
        """Make `folder`, and lock it.

        Raises:
            UserError: another run writes there, or the file cannot be written.
        """
        deadline = time.monotonic() + self._patience
        with _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = self._held.enter_context((folder / LOCK_FILE).open("a+", encoding="utf-8"))
            while not _locked(file, fcntl.LOCK_EX):
                if time.monotonic() >= deadline:
                    raise _in_use(folder)
                time.sleep(0.2)
            file.truncate(0)
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get(JOB_VARIABLE)}
            json.dump(holder | {"since": datetime.now().astimezone().isoformat(" ", "seconds")}, file)
            file.flush()


def refuse_in_use(folder: Path) -> None:
    """Raise UserError if a run writes in `folder` now. Nothing is written, and nothing stays locked."""
    with _disk_errors(folder):
        try:
            file = (folder / LOCK_FILE).open(encoding="utf-8")
        except FileNotFoundError:
            return
        with file:
            if not _locked(file, fcntl.LOCK_SH):  # an exclusive one would need a file open for writing on NFS
                raise _in_use(folder)


def _locked(file: TextIO, kind: int) -> bool:
    """Whether nobody else holds `file`; on a file system without locks a warning says that it is not known."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        logging.getLogger("opd_ds").warning(
            "%s: this file system has no locks (%s): start no second run with this run.output_dir",
            file.name, error.strerror,
        )  # fmt: skip
    return True


def _in_use(folder: Path) -> UserError:
    try:
        found = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
    except ValueError:  # it is being written
        who = "another run"
    else:
        job = f"job {found['job']}, " if found["job"] else ""
        who = f"a run on {found['host']} ({job}pid {found['pid']}, since {found['since']})"
    return UserError(
        f"run.output_dir = {str(folder)!r}: {who} writes here; wait for it, end it, or give another run.output_dir"
    )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run.output_dir = {str(folder)!r}: {LOCK_FILE} cannot be used: {error.strerror}; give another folder"
        ) from error
