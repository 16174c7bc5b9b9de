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

from opd_ds.cluster.signals import exit_code_asked_for
from opd_ds.cluster.world import JOB_VARIABLE, World
from opd_ds.errors import Interrupted, UserError

START_TIMEOUT = 600.0
SAID_AFTER = 30.0
_ANSWER_SECONDS = 3.0
_ACCELERATORS = ("cuda", "cpu", "xpu", "npu", "mps", "hpu", "mlu", "sdaa")  # of DeepSpeed 0.19.7
_PORTS_TRIED = 32


def ports(job: str) -> Iterator[int]:
    """Where a job's rank 0 may listen, in order: below Linux's range for outgoing connections, the same everywhere."""
    for attempt in range(_PORTS_TRIED):
        digest = hashlib.sha256(f"opd_ds/{job}/{attempt}".encode()).digest()
        yield 20000 + int.from_bytes(digest[:4], "big") % 12000


def listener(job: str) -> socket.socket:
    """A socket that listens on the first of the job's ports that is free on this host.

    Raises:
        UserError: all are taken.
    """
    for port in ports(job):
        with contextlib.suppress(OSError):
            if socket.has_dualstack_ipv6():  # the others may know this host by an IPv6 address only
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", port))
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
        Interrupted: this process was asked to stop.
    """
    greeting = f"opd-ds {world.job}".encode()
    if world.is_main:
        door = listener(world.job)
        with listener(f"{world.job}/store") as free:
            port = int(free.getsockname()[1])
        threading.Thread(target=_answer, args=(door, greeting, port, timeout), daemon=True).start()
        return port
    waiting = Waiting(world, timeout)
    while True:
        for candidate in ports(world.job):
            told = _knock(world.master_addr, candidate, greeting)
            if told is not None:
                return told
        waiting.go_on(f"rank 0 of job {world.job!r} on {world.master_addr}", 0.5)


class Waiting:
    """A wait for other ranks, which may never come: it says so after a while, and ends after `timeout` seconds."""

    def __init__(self, world: World, timeout: float) -> None:
        self._world, self._timeout, self._began, self._said = world, timeout, time.monotonic(), False

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._began + self._timeout - time.monotonic())

    def go_on(self, missing: str, pause: float) -> None:
        """Wait for another `pause` seconds.

        Args:
            missing: who is not there.

        Raises:
            UserError: the time is up.
            Interrupted: this process was asked to stop. There is nothing to save yet, and nobody to agree with.
        """
        world, waited = self._world, time.monotonic() - self._began
        code = exit_code_asked_for()
        if code is not None:
            print(f"opd-ds: rank {world.rank} stops waiting for {missing}", file=sys.stderr)
            raise Interrupted(code)
        text = f"rank {world.rank} of {world.size} has waited {waited:.0f} s for {missing}"
        if self.left == 0:
            raise UserError(f"{text}. {self._advice()}")
        if waited > SAID_AFTER and not self._said and self._speaks():
            print(f"opd-ds: {text} and goes on waiting. {self._advice()}", file=sys.stderr, flush=True)
            self._said = True
        time.sleep(min(pause, self.left))

    def _advice(self) -> str:
        alone = f" If this process should run alone, unset {self._world.told_by}" if self._world.told_by else ""
        return f"Are all ranks started, and may they connect to {self._world.master_addr}?{alone}"

    def _speaks(self) -> bool:
        """Rank 0, and where that is missing, the next on its node and the first on every other."""
        world = self._world
        return world.is_main or world.local_rank == (1 if world.rank == world.local_rank else 0)


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


def extensions_folder() -> Path:
    """Where DeepSpeed's small ops are compiled: a folder for each Python environment, because torch's own is one for
    all of them, and two with other versions of torch would compile each other's ops anew.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "torch_extensions" / f"opd_ds-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}"


def prepare_environment(world: World) -> None:
    """Environment that DeepSpeed and torch read when they start; call before importing them. Ranks that have no port
    yet agree on one here.

    Raises:
        UserError: DS_ACCELERATOR names none; ranks do not find each other.
    """
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator is not None and accelerator not in _ACCELERATORS:
        raise UserError(f"DS_ACCELERATOR = {accelerator!r}: unset it, or choose one of {', '.join(_ACCELERATORS)}")
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
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    # Torch's flight recorder keeps the last collectives, which tell who waits where.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "1000")
    # The launcher may be started by path from an environment that is not activated; DeepSpeed looks for ninja in PATH.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])


if __name__ == "__main__":  # for launcher scripts: a port for the job that runs here
    with listener(os.environ.get(JOB_VARIABLE) or os.getcwd()) as free:
        print(free.getsockname()[1])
