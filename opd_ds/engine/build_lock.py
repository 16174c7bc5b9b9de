"""Compiling DeepSpeed's small ops at first use, without waiting for the dead."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from pathlib import Path
from typing import IO

import torch
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from opd_ds.errors import UserError

# A lock file that no process of this machine has open may be another machine's: its build takes no longer than this,
# and its load of what is built, on a machine that is busy with other things, no longer than that.
STALE_BUILD_SECONDS, STALE_LOAD_SECONDS = 600.0, 60.0
_OURS = "opd_ds"


class BuildLock(FileBaton):
    """torch's lock around the build of one op, on which the kernel keeps an eye.

    torch (2.8 to 2.13) guards each build with a lock *file*. One that a killed process left makes every later start
    wait for ever, in silence. Beside it we hold a lock that ends with its process: who has that knows that a lock file
    of ours is a dead process's. Everybody builds in turn; who comes later finds nothing to do.
    """

    _held: IO[str] | None = None
    _certain = False

    def try_acquire(self) -> bool:
        """Wait for the lock; True."""
        file = Path(self.lock_file_path)
        if not any(file.parent.glob("*.so")):
            log = logging.getLogger("opd_ds")
            log.info("compiling DeepSpeed's op %s, once, into %s; this takes a minute", file.parent.name, file.parent)
        self._held = (file.parent / "opd_ds.lock").open("w")
        with contextlib.suppress(OSError):  # some network file systems know no locks
            fcntl.flock(self._held, fcntl.LOCK_EX)
            self._certain = True
        waiting = False
        while not super().try_acquire():
            if self._is_abandoned(file):
                logging.getLogger("opd_ds").warning("removing %s, left by a process that was killed", file)
                file.unlink(missing_ok=True)
                continue
            if not waiting:
                logging.getLogger("opd_ds").warning("waiting for %s: another process builds there", file)
            waiting = True
            time.sleep(0.2)
        file.write_text(_OURS)
        return True

    def release(self) -> None:
        """Let the next one build."""
        if self.fd is not None:
            os.close(self.fd)
        Path(self.lock_file_path).unlink(missing_ok=True)
        if self._held is not None:
            self._held.close()

    def _is_abandoned(self, file: Path) -> bool:
        try:
            found = file.stat()
            if self._certain and file.read_text() == _OURS:
                return True
        except FileNotFoundError:
            return False
        built = any(file.parent.glob("*.so"))
        age = time.time() - found.st_mtime
        return age > (STALE_LOAD_SECONDS if built else STALE_BUILD_SECONDS) and not _is_open(found)


def _is_open(file: os.stat_result) -> bool:
    """Whether a process of this user and machine has the file open, as torch's lock has while it is held."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samestat(descriptor.stat(), file):
                return True
    return False


def guard_builds() -> None:
    """From now on every op that this process builds is guarded by a `BuildLock`.

    Raises:
        UserError: this version of torch guards its builds otherwise.
    """
    if getattr(cpp_extension, "FileBaton", None) not in (FileBaton, BuildLock):
        raise UserError(f"torch {torch.__version__}: builds of extensions have another lock; install torch<2.14")
    setattr(cpp_extension, "FileBaton", BuildLock)  # noqa: B010  # a private name, says mypy
