"""The miniature SLURM cluster of `up.sh`, for tests; skipped with the reason where it cannot be."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "sshd", "ssh-keygen", "pdsh", "unshare", "nsenter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@dataclass(frozen=True)
class Cluster:
    """Nodes `login`, `n1`, `n2`; a file has the same path on all of them and here."""

    folder: Path
    environment: Mapping[str, str]

    def on(
        self,
        node: str,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, to its end; its two outputs are returned as one."""
        with self.start(node, *command, env=env, cwd=cwd) as process:
            return finish(process, timeout, check)

    def start(
        self, node: str, *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on a node. The process is nsenter's, which hands on no signal: use `kill` on the node."""
        pid = self._process_1(node)
        folder = cwd or Path.cwd()
        return subprocess.Popen(
            ["nsenter", "-t", str(pid), "-n", "-u", "-m", "-p", f"--wd={folder}", "--", *map(str, command)],
            env={**self.environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def submit(self, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """`sbatch` on the login node, from `cwd`; the job's id."""
        return self.on("login", "sbatch", "--parsable", *arguments, env=env, cwd=cwd).stdout.split()[-1]

    def cancel(self, *arguments: str) -> None:
        """`scancel` on the login node, signals included."""
        self.on("login", "scancel", *arguments)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, also some time after the job's end."""
        text = self.on("login", "scontrol", "show", "job", job).stdout
        return dict(re.findall(r"(\w+)=(.*?)(?=\s\w+=|\s*$)", text, re.MULTILINE))

    def job_state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_for(self, job: str, states: str | tuple[str, ...], timeout: float = 120, restarts: int = 0) -> str:
        """Wait until the job is in one of the states, after at least `restarts` restarts."""
        wanted = (states,) if isinstance(states, str) else states
        end = time.monotonic() + timeout
        while True:
            seen = self.job(job)
            state, started = seen["JobState"], int(seen["Restarts"]) + 1
            if state in wanted and started > restarts:
                return state
            said = f"job {job} is {state} ({seen['Reason']}) in start {started}, not {wanted} after {restarts} restarts"
            assert time.monotonic() < end, f"{said}:\n{self.output(job)}"
            time.sleep(0.2)

    def output(self, job: str) -> str:
        """What the job has written so far, over all its restarts."""
        file = Path(self.job(job)["StdOut"])
        return file.read_text(errors="replace") if file.is_file() else ""

    def kill_node(self, name: str) -> None:
        """The node crashes: every process on it is gone at once, and its address answers no more."""
        os.kill(self._process_1(name), signal.SIGKILL)

    def restore_nodes(self) -> None:
        """Bring crashed nodes back; jobs stay."""
        up(self.folder)

    def restore(self) -> None:
        """Cancel all jobs and bring crashed nodes back."""
        self.on("login", "scancel", "--partition=debug")
        up(self.folder)
        end = time.monotonic() + 60
        while left := self.on("login", "squeue", "-h").stdout:
            assert time.monotonic() < end, f"jobs that do not end:\n{left}"
            time.sleep(0.2)

    def _process_1(self, node: str) -> int:
        return int((self.folder / "pids" / node).read_text().split()[0])


def finish(process: subprocess.Popen[str], timeout: float, check: bool) -> subprocess.CompletedProcess[str]:
    """Wait for a process that leads its own group; past `timeout` seconds the whole group is killed."""
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        raise AssertionError(f"{process.args}: still running after {timeout} s:\n{out[-4000:]}") from None
    if check:
        assert process.returncode == 0, out[-6000:]
    return subprocess.CompletedProcess(process.args, process.returncode, out)


def up(folder: Path) -> None:
    """Start the cluster, or what is missing of it."""
    # No pipe for the output: the daemons would keep it open.
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(["bash", HERE / "up.sh"], env=_base(folder), stdout=log, stderr=log, timeout=120)
        log.seek(0)
        assert done.returncode == 0, f"the cluster does not start:\n{log.read()}"


def _base(folder: Path) -> dict[str, str]:
    return {**os.environ, "BASE": str(folder)}


def _reason_to_skip() -> str:
    if os.geteuid() != 0:
        return "the cluster needs root"
    missing = [command for command in COMMANDS if not shutil.which(command)]
    if missing:
        return f"no {', '.join(missing)}: bash tests/cluster/install.sh"
    trial = subprocess.run(["unshare", "-n", "-u", "-m", "-p", "-f", "--mount-proc", "true"], capture_output=True)
    return f"no namespaces here: {trial.stderr.decode().strip()}" if trial.returncode else ""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster that is up and empty. One that was up before stays up."""
    if reason := _reason_to_skip():
        pytest.skip(reason)
    folder = Path(os.environ.get("OPD_DS_CLUSTER", Path(tempfile.gettempdir()) / "opd-ds-cluster"))
    was_up = (folder / "shape").exists()
    up(folder)
    # As after `. env.sh`, in an environment that no launcher has written into, with this interpreter's on PATH.
    clean = {
        name: value
        for name, value in os.environ.items()
        if not re.match(r"(SLURM|SBATCH|SRUN|MASTER|LOCAL|RANK|WORLD|CROSS|PDSH)", name)
    }
    clean["PATH"] = f"{Path(sys.executable).parent}:{clean['PATH']}"
    clean |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    clean["SBATCH_EXPORT"] = "ALL"  # counts for more than the script's own --export=NONE
    printed = subprocess.run(
        ["bash", "-c", f". '{folder}/env.sh' && env -0"], env=clean, capture_output=True, text=True, check=True
    ).stdout
    environment = dict(entry.split("=", 1) for entry in printed.split("\0") if entry)
    running = Cluster(folder, environment)
    yield running
    running.restore()
    if not was_up:
        subprocess.run(["bash", HERE / "down.sh"], env=_base(folder), check=True, timeout=120)
