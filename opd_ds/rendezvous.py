"""How ranks that nobody gave a port find one another: rank 0 opens a door at the first free port of the job's list.

The list is the same on all ranks (`launch.ports`), but only rank 0 can know which of its ports are taken there. So it
listens at the first free one, and the others knock along the list until somebody answers with the job's name.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from opd_ds.errors import UserError
from opd_ds.launch import World, listener, ports

START_TIMEOUT = 600.0
_ANSWER_SECONDS = 3.0


def agree_on_port(world: World, timeout: float = START_TIMEOUT) -> int:
    """The port for torch's store, the same on all ranks; each rank calls this once. `timeout` in seconds.

    Raises:
        UserError: rank 0 was not found in time, or has no free port.
    """
    greeting = f"opd-ds {world.job}".encode()
    if world.is_main:
        door = listener(world.job)
        door.listen(128)
        with listener(f"{world.job}/store") as free:
            port = int(free.getsockname()[1])
        threading.Thread(target=_answer, args=(door, greeting, port, timeout), daemon=True).start()
        return port
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for candidate in ports(world.job):
            told = _knock(world.master_addr, candidate, greeting)
            if told is not None:
                return told
        time.sleep(0.5)
    raise UserError(
        f"rank {world.rank} found no rank 0 of job {world.job!r} on {world.master_addr} within {timeout:.0f} s; is it "
        "started, and may this host connect to it? MASTER_ADDR and MASTER_PORT name another place"
    )


def _answer(door: socket.socket, greeting: bytes, port: int, seconds: float) -> None:
    """Tell the port to whoever knows the job's name. Visitors are not counted: one may give up before it is answered,
    and come again.
    """
    deadline = time.monotonic() + seconds
    with door:
        while time.monotonic() < deadline:
            door.settimeout(max(0.1, deadline - time.monotonic()))
            with contextlib.suppress(OSError):
                visitor, _ = door.accept()
                with visitor:
                    visitor.settimeout(_ANSWER_SECONDS)
                    if visitor.recv(256) == greeting:
                        visitor.sendall(b"%s %d" % (greeting, port))


def _knock(host: str, port: int, greeting: bytes) -> int | None:
    """What rank 0 answers there; None where nobody, or somebody else, does."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), _ANSWER_SECONDS) as visit:
        visit.settimeout(_ANSWER_SECONDS)
        visit.sendall(greeting)
        name, _, answer = visit.recv(256).rpartition(b" ")
        if name == greeting and answer.isdigit():
            return int(answer)
    return None
