"""Ranks that fail, die or hang, with no launcher to end the others: the job ends everywhere, and says it once."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd_ds.cluster.rendezvous import unused_port
from tests.ranks import SET_BY_LAUNCHERS, Process, fork
from tests.runs import wait_for_rounds
from tests.tiny import run_settings, write_config

pytestmark = [pytest.mark.multirank, pytest.mark.extended]

# Seconds are shorter than in earnest; rank 1's third round may be replaced by a fault.
SCRIPT = """
import os, sys, time
import opd_ds.cluster.signals
import opd_ds.cluster.watchdog
import opd_ds.training.trainer
from opd_ds.cli.main import main
from opd_ds.errors import UserError

opd_ds.cluster.signals.SAME_REQUEST_SECONDS = 1.5
opd_ds.cluster.watchdog.BEAT_SECONDS = 0.5
opd_ds.cluster.watchdog.LOST_SECONDS = {lost_seconds}
plain = opd_ds.training.trainer.Trainer.run_round

def run_round(self, index):
    if index == 2 and os.environ["RANK"] == "1":
        {fault}
    return plain(self, index)

opd_ds.training.trainer.Trainer.run_round = run_round
sys.argv = ["opd-ds", "train", "--config", sys.argv[1]]
main()
"""
LOST_SECONDS = 10  # on busy cores a thread may wait for seconds


@dataclass
class Ended:
    codes: list[int]
    outputs: list[str]
    seconds: float


@dataclass
class Job:
    """Some ranks, each a process of its own."""

    folder: Path
    processes: list[Process]

    def wait(self, timeout: float) -> Ended:
        """Until both are gone; seconds count from now."""
        started = time.monotonic()
        try:
            codes = [process.wait(timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.send_signal(signal.SIGKILL)
        return Ended(codes, [process.output for process in self.processes], time.monotonic() - started)

    def reach_round(self, count: int) -> None:
        wait_for_rounds(self.folder, count)


def start(world: Path, folder: Path, fault: str = "pass", ranks: int = 2, **changes: object) -> Job:
    """With a fault, rank 1's third round is replaced by it."""
    settings = {"run__rounds": 100_000, "run__checkpoint_every": 100_000, "rollout__steps": 1, **changes}
    config = write_config(folder / "run.yaml", run_settings(world, folder / "out", **settings))
    script = folder / "rank.py"
    script.write_text(SCRIPT.format(fault=fault, lost_seconds=LOST_SECONDS))
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    shared = sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port())}
    environment = os.environ | shared
    processes = [
        fork(str(script), str(config), environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    return Job(folder / "out", processes)


def test_a_killed_rank_is_missed(tiny_world: Path, tmp_path: Path) -> None:
    """Its connections close: the collective of the other breaks off."""
    job = start(tiny_world, tmp_path)
    job.reach_round(2)
    job.processes[1].send_signal(signal.SIGKILL)
    ended = job.wait(60)
    assert ended.codes == [76, -signal.SIGKILL]
    assert f"lost rank 1 on {socket.gethostname()}, which said nothing: killed" in ended.outputs[0]
    assert "Traceback" not in ended.outputs[0]


def test_a_killed_teacher_rank_is_missed(tiny_world: Path, tmp_path: Path) -> None:
    """The ranks that train miss its answers; the run ends everywhere, and one rank says so."""
    job = start(tiny_world, tmp_path, ranks=3, scoring__ranks=1)
    job.reach_round(2)
    job.processes[2].send_signal(signal.SIGKILL)
    ended = job.wait(60)
    assert ended.codes == [76, 76, -signal.SIGKILL]
    assert "".join(ended.outputs).count(f"lost rank 2 on {socket.gethostname()}, which said nothing: killed") == 1
    assert "Traceback" not in "".join(ended.outputs)


@pytest.mark.slow
def test_a_killed_rank_0_is_missed(tiny_world: Path, tmp_path: Path) -> None:
    """It holds the store in which ranks leave word."""
    job = start(tiny_world, tmp_path)
    job.reach_round(2)
    job.processes[0].send_signal(signal.SIGKILL)
    ended = job.wait(60)
    assert ended.codes == [-signal.SIGKILL, 76]
    assert ended.outputs[1].count("opd-ds: error: lost rank 0") == 1


def test_a_node_that_is_gone_is_missed(tiny_world: Path, tmp_path: Path) -> None:
    """It closes no connection: the others wait in a collective, as they would for an hour."""
    job = start(tiny_world, tmp_path)
    job.reach_round(2)
    job.processes[1].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    assert job.processes[0].wait(60) == 76
    assert time.monotonic() - started < 3 * LOST_SECONDS
    job.processes[1].send_signal(signal.SIGKILL)
    ended = job.wait(10)
    assert f"lost rank 1 on {socket.gethostname()}: no heartbeat for {LOST_SECONDS} s" in ended.outputs[0]


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ('raise KeyError("a bug")', 1, "[rank 1 on "),
        pytest.param(
            'raise UserError("tasks.one: something to fix")',
            2,
            "opd-ds: error: tasks.one: something to fix",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            'raise OSError(28, "No space left on device", "/x/metrics.jsonl")',
            1,
            "could not write /x/metrics.jsonl",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["bug", "user error", "full disk"],
)
def test_the_rank_that_fails_speaks_and_all_leave_with_its_code(
    tiny_world: Path, tmp_path: Path, fault: str, code: int, said: str
) -> None:
    ended = start(tiny_world, tmp_path, fault).wait(120)
    assert ended.codes == [code, code]
    assert said in ended.outputs[1]
    assert "opd-ds:" not in ended.outputs[0]
    assert "Traceback" not in ended.outputs[0]
    assert ("Traceback" in ended.outputs[1]) == ("KeyError" in fault)


def test_a_hang_is_found_and_says_who_waits_where(tiny_world: Path, tmp_path: Path) -> None:
    """Rank 1 never comes to the collectives of round 3."""
    ended = start(tiny_world, tmp_path, "time.sleep(1000)", run__hang_minutes=0.1).wait(150)
    assert ended.codes == [76, 76]
    said = "".join(ended.outputs)
    assert said.count("no rank made progress for 6 s") == 1
    assert "gloo:" in said
    lines = {line.split()[1]: line for line in said.splitlines() if line.startswith("  rank ")}
    assert lines.keys() == {"0", "1"}
    assert "in 'round 3" in lines["0"]
    assert "in gloo:" in lines["0"]
    assert re.search(r"\w+\.py:\d+ \w+", lines["1"])  # the line of the product that it has not left
    hang = tmp_path / "out" / "hang"
    for rank in range(2):
        assert "rank.py" in (hang / f"rank-{rank:05d}.stacks.txt").read_text()
        assert json.loads((hang / f"rank-{rank:05d}.collectives.json").read_text())["entries"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_second_signal_ends_a_rank_that_waits_in_a_collective(
    tiny_world: Path, tmp_path: Path, number: signal.Signals
) -> None:
    job = start(tiny_world, tmp_path, "time.sleep(1000)")
    job.reach_round(2)
    time.sleep(1)
    job.processes[0].send_signal(number)
    assert job.processes[0].poll(2) is None
    job.processes[0].send_signal(number)
    assert job.processes[0].wait(10) == 128 + number
    job.processes[1].send_signal(signal.SIGKILL)
    job.wait(10)


def test_usr1_saves_and_asks_to_be_started_again(tiny_world: Path, tmp_path: Path) -> None:
    """Sent twice to one rank, as schedulers and scripts do; both ranks leave."""
    job = start(tiny_world, tmp_path)
    job.reach_round(2)
    for _ in range(2):
        job.processes[1].send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    ended = job.wait(60)
    assert ended.codes == [75, 75]
    assert ended.outputs[0].count("interrupted after round") == 1
    done = len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert (tmp_path / "out" / "checkpoints" / f"round-{done:06d}").is_dir()


def test_a_signal_before_the_first_round_is_not_lost(tiny_world: Path, tmp_path: Path) -> None:
    """The command as users start it: nothing is imported yet."""
    config = write_config(tmp_path / "run.yaml", run_settings(tiny_world, tmp_path / "out", run__rounds=100_000))
    process = subprocess.Popen(
        [sys.executable, "-m", "opd_ds.cli", "train", "--config", str(config)],
        env={name: value for name, value in os.environ.items() if name not in SET_BY_LAUNCHERS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():  # libraries are loading
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "interrupted after round 0; nothing to save yet" in output
