"""How a run ends when it ends badly: one message, from the rank that failed first, and never a hang."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING

from opd_ds.cluster.signals import exit_code_on_sigterm, ignore_signals
from opd_ds.errors import IncompleteError, Interrupted, NonFiniteError, UserError, fitted
from opd_ds.utils.disk_errors import disk_error

if TYPE_CHECKING:
    from opd_ds.cluster.watchdog import Watchdog

# The launcher ends all other processes within about a second of the first that exits.
SECONDS_TO_BE_ENDED = 6.0
# How gloo and NCCL say it.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "ncclRemoteError",
    "remote process exited",
)
_ONE_LINE = UserError | NonFiniteError | IncompleteError  # the message says all; a traceback would only hide it
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def report_and_exit(error: BaseException) -> None:
    """Say what went wrong and end the process.

    `os._exit` skips the process group's destructors, which would wait for ranks that are gone.
    """
    if isinstance(error, Interrupted):
        # The state is saved. A normal exit would wait for rewards that are still being computed.
        _end(error.code)
    watchdog = _watchdog()
    if watchdog is not None:
        ignore_signals()
        watchdog.mark_exiting()
        _end(_settle(error, watchdog))
    # No group yet: all ranks read the same config and fail alike. Rank 0 speaks, and the launcher ends the others;
    # only one that is still there after that, because it failed alone, speaks for itself.
    values = (os.environ.get(name, "") for name in ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"))
    rank = int(next(filter(str.isdecimal, values), "0"))  # no number may be what the error is about
    if rank > 0:
        exit_code_on_sigterm(_code(error))
        time.sleep(SECONDS_TO_BE_ENDED)
    print(message(error, f"[rank {rank}] " if rank > 0 else ""), file=sys.stderr)
    _end(_code(error))


def _settle(error: BaseException, watchdog: Watchdog) -> int:
    """Speak if this rank is the first to fail; returns the exit code, which is the first one's."""
    from opd_ds.cluster.watchdog import BEAT_SECONDS, LOST_EXIT_CODE

    rank = int(os.environ["RANK"])
    where = "" if isinstance(error, _ONE_LINE) else f"[rank {rank} on {socket.gethostname()}] "
    code, text = _code(error), message(error, where)
    try:
        if _is_consequence(error):
            known = watchdog.failure()
            if known is not None:
                return known.code
            lost = ", ".join(f"rank {silent} on {watchdog.host_of(silent)}" for silent in watchdog.silent_ranks())
            if lost:  # nobody is, and nobody has said anything: then it is this rank's own failure
                code = LOST_EXIT_CODE
                text = f"opd-ds: error: lost {lost}, which said nothing: killed (out of memory?), or its node is gone. "
                text += f"{where}noticed it in: {_first_line(error)}"
        first = watchdog.claim(code, text)
    except RuntimeError as gone:  # the store went with rank 0; what is our own to say is still said
        if _is_consequence(error):
            watchdog.say_store_is_gone(gone)
            return LOST_EXIT_CODE
        print(text, file=sys.stderr)
        return code
    if first.rank == rank:
        print(text, file=sys.stderr)
    sys.stderr.flush()
    if rank == 0:
        time.sleep(2.5 * BEAT_SECONDS)  # rank 0 holds the store in which the others read this
    return first.code


def _is_consequence(error: BaseException) -> bool:
    """Of another rank's end: a collective that broke off."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER)


def message(error: BaseException, where: str = "") -> str:
    """What a person is told of `error`, as it is printed; `where` says which rank it was."""
    if isinstance(error, _ONE_LINE):
        return fitted(str(error).splitlines() or [""], f"opd-ds: error: {where}")
    disk = disk_error(error)
    if disk is not None and disk.errno in _DISK:
        file = f" {disk.filename}" if disk.filename else ""
        return f"opd-ds: error: {where}could not write{file}: {disk.strerror}; the last checkpoint is intact"
    trace = "".join(traceback.format_exception(error)).rstrip()
    return f"opd-ds: {where}failed:\n{trace}"


def _code(error: BaseException) -> int:
    return 2 if isinstance(error, UserError) else 3 if isinstance(error, NonFiniteError) else 1


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _watchdog() -> Watchdog | None:
    module = sys.modules.get("opd_ds.cluster.watchdog")  # not imported when the config was already wrong
    return module.current_watchdog() if module is not None else None
