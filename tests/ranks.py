"""Ranks that start in a tenth of a second: forks of one process that has imported the libraries.

Started as users start it, a rank spends six seconds of a core on importing torch, DeepSpeed and diffusers; the tiny run
that it is there for takes one. So the first rank that a test starts brings up a server, one for each pytest worker:
this module as a program. The server imports the libraries and waits. It has a single thread, no process group and no
compiled op, so that a fork of it is what a fresh interpreter is after the same imports. For each request it forks; the
child takes the environment, the folder and the arguments it is told, and from there on is a program like any other: it
leads a session of its own, ends by itself and can be killed. When the tests are gone, the server kills what is left.

    launch(2, "--config", file)       `opd-ds train` on two ranks, to the end, as under a launcher
    start(2, "--config", file)        the same, without waiting
    fork("-m", "opd_ds.cli", ...)     one process, with the environment that it is given

What only the deepspeed launcher shows is tested under it: see the end of tests/test_multirank.py.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from opd_ds.cluster.rendezvous import unused_port

# For `launch`: several configs in one process group.
TRAIN_MANY = "opd_ds.testing.train_many"
SET_BY_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What ranks of tiny runs import, sooner or later: diffusers and DeepSpeed import much only when it is used.
LIBRARIES = (
    "opd_ds.cli.main",
    "opd_ds.doctor.examination",
    "opd_ds.models.sd3",
    "opd_ds.runs.evaluate",
    "opd_ds.runs.train",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # 0.19: decorated with torch.compile, which brings inductor
    "diffusers.models.transformers.transformer_sd3",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "torch.utils.cpp_extension",
)
_LARGEST_REQUEST = 2**20  # bytes
_TERM_SECONDS = 30.0  # after one rank has failed, the others are asked to end, and killed after so long


# ---- for tests ----


class Process:
    """A forked process, with what tests use of `subprocess.Popen`.

    Attributes:
        returncode: None while nobody has seen it end; -N: ended by signal N.
    """

    def __init__(self, arguments: tuple[str, ...], pid: int, status: int, written: IO[bytes]) -> None:
        self.args, self.pid = arguments, pid
        self.returncode: int | None = None
        self._status, self._written = status, written

    @property
    def output(self) -> str:
        """What it has written to stdout and stderr so far, and whoever shares its output."""
        file = self._written.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def poll(self, seconds: float = 0) -> int | None:
        """The exit code, or None where it does not end within `seconds`."""
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            self.returncode = int(os.read(self._status, 16))
            os.close(self._status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code; a process that runs longer than `timeout` seconds is killed, and the test fails."""
        code = self.poll(timeout)
        if code is None:
            self.send_signal(signal.SIGKILL)
            raise AssertionError(f"{self.args}: still running after {timeout} s:\n{self.output[-4000:]}")
        return code

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Ranks:
    """The processes of one job, which write to one file."""

    def __init__(self, processes: list[Process]) -> None:
        self.processes = processes

    @property
    def output(self) -> str:
        return self.processes[0].output

    def wait(self, timeout: float) -> int:
        """As a launcher: 0 where all ranks end with it, else the code of the first that does not, whereupon the others
        are ended. Past `timeout` seconds all are killed, and the test fails."""
        deadline = time.monotonic() + timeout
        while running := [process for process in self.processes if process.poll() is None]:
            failed = next((process for process in self.processes if process.returncode), None)
            if failed is not None:
                _end(running)
                return failed.wait(0)
            if time.monotonic() > deadline:
                _end(running, number=signal.SIGKILL)
                raise AssertionError(f"{running[0].args}: running after {timeout} s:\n{self.output[-4000:]}")
            running[0].poll(0.05)
        return next((process.wait(0) for process in self.processes if process.returncode), 0)


def _end(processes: list[Process], *, number: int = signal.SIGTERM) -> None:
    for process in processes:
        process.send_signal(number)
    deadline = time.monotonic() + _TERM_SECONDS
    for process in processes:
        if process.poll(max(0.0, deadline - time.monotonic())) is None:
            process.send_signal(signal.SIGKILL)
            process.wait(_TERM_SECONDS)


def fork(*arguments: str, environment: Mapping[str, str], written: IO[bytes] | None = None) -> Process:
    """A process of what would follow `python` on a command line: a script or `-m MODULE`, and its arguments.

    It writes to a file of its own unless one is given.
    """
    written = written or tempfile.TemporaryFile()  # noqa: SIM115
    ended, status = os.pipe()
    request = json.dumps({"arguments": arguments, "environment": dict(environment), "folder": os.getcwd()}).encode()
    assert len(request) < _LARGEST_REQUEST
    server = _server()
    socket.send_fds(server, [request], [written.fileno(), status])
    os.close(status)
    pid = server.recv(16)
    assert pid, "the server of ranks has ended; its last words are on stderr"
    return Process(arguments, int(pid), ended, written)


def start(ranks: int, *arguments: str, script: str | None = None, command: str = "train") -> Ranks:
    """`opd-ds <command>`, or `script` (a file or a module), on `ranks` processes of one group."""
    plain = {name: value for name, value in os.environ.items() if name not in SET_BY_LAUNCHERS}
    if script is None:
        arguments = ("-m", "opd_ds.cli", command, *arguments)
    else:
        arguments = (script, *arguments) if script.endswith(".py") else ("-m", script, *arguments)
    written = tempfile.TemporaryFile()  # noqa: SIM115
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": unused_port()}
    processes = []
    for rank in range(ranks):
        own = {} if ranks == 1 else shared | {"RANK": rank, "LOCAL_RANK": rank}
        environment = plain | {name: str(value) for name, value in own.items()}
        processes.append(fork(*arguments, environment=environment, written=written))
    return Ranks(processes)


def launch(
    ranks: int,
    *arguments: str,
    script: str | None = None,
    command: str = "train",
    timeout: float = 300,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; with `check` a failure shows the run's output."""
    started = start(ranks, *arguments, script=script, command=command)
    code = started.wait(timeout)
    if check:
        assert code == 0, started.output[-6000:]
    return subprocess.CompletedProcess(arguments, code, started.output)


@functools.cache
def _server() -> socket.socket:
    """The connection to this worker's server, which ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _LARGEST_REQUEST)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # with more, torch 2.8 starts its pool when it is imported
    # Of its own session: Ctrl-C is for the tests, and the server ends with them.
    command = [sys.executable, "-m", "tests.ranks", str(theirs.fileno())]
    server = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    atexit.register(server.wait)
    atexit.register(ours.close)  # called before the other
    return ours


# ---- the server ----


def serve(connection: socket.socket) -> list[str]:
    """Fork for each request and tell how the forks end, until the tests are gone. Returns in forks only: the arguments
    of the program that this process now is."""
    waiting = selectors.DefaultSelector()
    waiting.register(connection, selectors.EVENT_READ)
    running: dict[int, tuple[int, int]] = {}  # pid and where to write its exit code, by the descriptor of the process
    while True:
        for key, _ in waiting.select():
            if key.fd in running:
                pid, status = running.pop(key.fd)
                waiting.unregister(key.fd)
                os.close(key.fd)
                _, ended = os.waitpid(pid, 0)
                os.write(status, b"%d" % os.waitstatus_to_exitcode(ended))
                os.close(status)
                continue
            data, files, _, _ = socket.recv_fds(connection, _LARGEST_REQUEST, 2)
            if not data:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                sys.exit()
            written, status = files
            pid = os.fork()
            if pid == 0:
                for other in (connection.fileno(), status, *running, *(end for _, end in running.values())):
                    os.close(other)
                waiting.close()
                return _become(json.loads(data), written)
            os.close(written)
            process = os.pidfd_open(pid)
            running[process] = (pid, status)
            waiting.register(process, selectors.EVENT_READ)
            connection.send(b"%d" % pid)


def _become(request: dict[str, object], written: int) -> list[str]:
    os.setsid()
    for stream in (1, 2):
        os.dup2(written, stream)
    os.close(written)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    # What a killed rank has said is in its output.
    sys.stdout.reconfigure(line_buffering=True)
    return request["arguments"]


def run(arguments: list[str]) -> None:
    """What `python` does with its arguments."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


def import_libraries() -> None:
    """Import `LIBRARIES`; a thread that this starts would be missing in every fork."""
    for name in LIBRARIES:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"imports have started {len(threads) - 1} threads"
    gc.collect()
    gc.freeze()  # no collection in a fork looks at them, or copies their pages


if __name__ == "__main__":
    import_libraries()
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
