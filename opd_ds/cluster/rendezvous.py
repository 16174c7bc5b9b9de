"""How ranks that nobody gave a port find one another: rank 0 opens a door at the first free port of the job's list.

The list is the same on all ranks (`ports`), but only rank 0 can know which of its ports are taken there. So it
listens at the first free one, and the others knock along the list until somebody answers with the job's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from opd_ds.cluster.world import World
from opd_ds.errors import UserError

START_TIMEOUT = 600.0
_ANSWER_SECONDS = 3.0
_PORTS_TRIED = 32


def ports(job: str) -> Iterator[int]:
    """Where a job's rank 0 may listen, in order: below Linux's range for outgoing connections, the same everywhere."""
    for attempt in range(_PORTS_TRIED):
        digest = hashlib.sha256(f"opd_ds/{job}/{attempt}".encode()).digest()
        yield 20000 + int.from_bytes(digest[:4], "big") % 12000


def listener(job: str) -> socket.socket:
    """A socket bound to the first of the job's ports that is free on this host.

    Raises:
        UserError: all are taken.
    """
    for port in ports(job):
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(("", port))
        except OSError:
            bound.close()
            continue
        return bound
    tried = ", ".join(map(str, islice(ports(job), 3)))
    raise UserError(f"all {_PORTS_TRIED} ports of job {job!r} are taken on this host ({tried}, ...); set MASTER_PORT")


def unused_port() -> int:
    """A port that nobody on this host listens on, chosen by the system."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def set_local_rank(index: int) -> None:
    """Say which of this node's processes, or devices, this one is. Where mpirun says it too, DeepSpeed (0.19.8,
    engine.py) insists that both say the same: they do not where a launcher runs under mpirun, nor where each rank sees
    its own device only, which then has the number 0.
    """
    os.environ["LOCAL_RANK"] = str(index)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)


def prepare_environment(world: World) -> None:
    """Environment that DeepSpeed and torch read when they start; call before importing them. Ranks that have no port
    yet agree on one here.
    """
    port = world.master_port
    if port is None:
        port = unused_port() if world.size == 1 else agree_on_port(world)
    os.environ |= {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "MASTER_ADDR": world.master_addr,
        "MASTER_PORT": str(port),
    }
    set_local_rank(world.local_rank)
    # Torch's flight recorder keeps the last collectives, which tell who waits where.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "1000")
    # The launcher may be started by path from an environment that is not activated; DeepSpeed looks for ninja in PATH.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])


if __name__ == "__main__":  # for launcher scripts: a port for the job that runs here
    with listener(os.environ.get("SLURM_JOB_ID") or os.getcwd()) as free:
        print(free.getsockname()[1])
