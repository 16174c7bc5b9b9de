"""How a run ends when it ends badly: one message, from the rank that failed, and never a hang."""

from __future__ import annotations

import os
import sys
import time
import traceback

from opd_ds.errors import Interrupted, NonFiniteError, UserError

# The launcher ends all other processes within about a second of the first that exits.
SECONDS_TO_BE_ENDED = 6.0
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")


def leave(error: BaseException) -> None:
    """Say what went wrong and end the process.

    A failure that all ranks share is said by rank 0: the others wait to be ended by the launcher, and only a rank that
    is still there after that, because it failed alone, speaks for itself. `os._exit` skips the process group's
    destructors, which would wait for peers that are gone.
    """
    if isinstance(error, Interrupted):
        # The state is saved. A normal exit would wait for rewards that are still being judged.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error.code, int) else 0)
    rank = int(os.environ.get("RANK", "0"))
    agreed = _group_is_up() and isinstance(error, UserError | NonFiniteError)
    if rank > 0:
        time.sleep(SECONDS_TO_BE_ENDED)
    if rank == 0 or not agreed:
        _say(error, f"[rank {rank}] " if rank > 0 else "")
    code = 2 if isinstance(error, UserError) else 3 if isinstance(error, NonFiniteError) else 1
    sys.stderr.flush()
    os._exit(code)


def _say(error: BaseException, where: str) -> None:
    if isinstance(error, UserError | NonFiniteError):
        for line in str(error).splitlines():
            print(f"opd-ds: error: {where}{line}", file=sys.stderr)
    elif any(sign in str(error) for sign in _LOST_PEER):
        print(f"opd-ds: {where}lost another rank, which failed first; its message says why", file=sys.stderr)
    else:
        trace = "".join(traceback.format_exception(error))
        print(f"opd-ds: {where}failed:\n{trace}", file=sys.stderr)


def _group_is_up() -> bool:
    torch = sys.modules.get("torch")  # not imported when the config was already wrong
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
