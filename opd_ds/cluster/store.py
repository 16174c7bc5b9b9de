"""The key-value store in which the ranks of a run meet, before and without a process group."""

from __future__ import annotations

import errno
import os
import socket
from datetime import timedelta

from torch.distributed import DistNetworkError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from opd_ds.cluster.rendezvous import START_TIMEOUT, Waiting
from opd_ds.cluster.world import World
from opd_ds.errors import UserError

_TRY_SECONDS = 15.0  # for one connection: meanwhile nobody looks at signals
_SHOWN_RANKS = 8
_TELL_SECONDS = 5.0


def open_store(world: World, timeout: float = START_TIMEOUT) -> TCPStore:
    """A client of the store at MASTER_ADDR:MASTER_PORT, which rank 0 opens. `timeout` in seconds.

    As torch's env:// does it: torchrun's agent has the store already; else rank 0 opens it, and the process group that
    starts later in this process shares it (multi_tenant).

    Raises:
        UserError: the port is taken, or nobody listens there in time.
        Interrupted: this process was asked to stop.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    opens = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    waiting = Waiting(world, timeout)
    while True:
        seconds = min(_TRY_SECONDS, max(1.0, waiting.left))
        try:
            if not opens:
                socket.create_connection((address, port), seconds).close()  # torch's own attempts cannot be interrupted
            return TCPStore(
                address,
                port,
                is_master=opens,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except OSError:
            waiting.go_on(f"rank 0 at {address}:{port}", 0.2)
        except DistNetworkError as error:
            if opens:
                raise UserError(_not_opened(world, port, error)) from error
            waiting.go_on(f"rank 0 at {address}:{port}, where something else may listen", 0.2)


def _not_opened(world: World, port: int, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if "EADDRINUSE" in reason or os.strerror(errno.EADDRINUSE) in reason:
        reason = "another process listens on this port"
    return (
        f"MASTER_PORT = {port}: rank 0 on {socket.gethostname()} cannot use it ({reason}); set MASTER_PORT to a free "
        "port, or unset it"
    )


def wait_for_ranks(world: World, device: str = "", timeout: float = START_TIMEOUT) -> TCPStore:
    """Until all ranks are there; each calls this once. The store, which rank 0 must keep until the group is up.

    Args:
        device: names the device of this rank, the same for all ranks that would use it; empty: shared by right.
        timeout: seconds.

    Raises:
        UserError: the port is taken, some ranks did not come in time, or two have one device.
        Interrupted: this process was asked to stop.
    """
    store = open_store(world, timeout)
    # torchrun keeps its store over restarts of the ranks.
    own = PrefixStore(f"opd_ds/arrival/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    waiting, missing, problem = Waiting(world, timeout), list(range(world.size)), ""
    try:
        own.set(str(world.rank), device)
        while world.is_main and (missing := [rank for rank in missing if not own.check([str(rank)])]):
            waiting.go_on(_names(missing), 0.05)
        if world.is_main:
            own.set("all", _shared_device([own.get(str(rank)).decode() for rank in range(world.size)]))
        while not own.check(["all"]):
            waiting.go_on("the other ranks", 0.05)
        problem = own.get("all").decode()
        if problem:
            own.set(f"told/{world.rank}", "")
            if world.is_main:  # the store goes with this rank
                own.wait([f"told/{rank}" for rank in range(world.size)], timedelta(seconds=_TELL_SECONDS))
    except RuntimeError as error:
        if not problem:
            raise UserError(f"rank {world.rank} of {world.size}: rank 0 ended before all ranks were there") from error
    if problem:
        raise UserError(problem)
    return store


def _shared_device(devices: list[str]) -> str:
    """What is wrong where two ranks have one device, or an empty string."""
    first: dict[str, int] = {}
    for rank, device in enumerate(devices):
        if device and first.setdefault(device, rank) != rank:
            return (
                f"ranks {first[device]} and {rank} have the same GPU ({device}): start one process per GPU, and look "
                "at CUDA_VISIBLE_DEVICES, which must show each process its own or all of them"
            )
    return ""


def _names(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks[:_SHOWN_RANKS]))
    more = f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {names}{more}"
