"""Ranks that wait for others which are not there: they say so, they can be stopped, and a taken port is one line."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from opd_ds.cluster.rendezvous import unused_port
from opd_ds.cluster.store import wait_for_ranks
from opd_ds.cluster.world import World
from opd_ds.engine import comm
from opd_ds.errors import UserError
from tests.ranks import SET_BY_LAUNCHERS, Process, fork
from tests.tiny import run_settings, write_config

pytestmark = pytest.mark.multirank

SCRIPT = """
import sys
import opd_ds.cluster.rendezvous
from opd_ds.cli.main import main

opd_ds.cluster.rendezvous.SAID_AFTER = 0.5
sys.argv = ["opd-ds", "train", "--config", sys.argv[1]]
main()
"""
# What a shell inside `srun -n2 --pty` has.
IN_SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
IN_SRUN |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "here"}


def start(world: Path, folder: Path, variables: Mapping[str, str]) -> Process:
    config = write_config(folder / "run.yaml", run_settings(world, folder / "out"))
    script = folder / "rank.py"
    script.write_text(SCRIPT)
    plain = {name: value for name, value in os.environ.items() if name not in SET_BY_LAUNCHERS}
    return fork(str(script), str(config), environment=plain | dict(variables))


def left_over(rank: int, port: int) -> dict[str, str]:
    """Variables of another start that the shell still has."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **place}


@pytest.mark.parametrize(
    ("variables", "missing", "unset"),
    [
        (IN_SRUN, "rank 0 of 2 has waited 1 s for rank 1 and goes on", "unset SLURM_STEP_ID"),
        (IN_SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, "for rank 0 of job '7.0'", "unset SLURM_STEP_ID"),
        (left_over(0, unused_port()), "for rank 1 and goes on", "unset RANK LOCAL_RANK WORLD_SIZE"),
        (left_over(1, unused_port()), "rank 1 of 2 has waited 1 s for rank 0 at", "unset RANK LOCAL_RANK WORLD_SIZE"),
        (
            left_over(0, unused_port()) | {"TORCHELASTIC_USE_AGENT_STORE": "True"},
            "for rank 0 at",
            "unset RANK LOCAL_RANK WORLD_SIZE",
        ),
    ],
    ids=["in srun", "in srun, rank 1", "left over", "left over, rank 1", "left over of torchrun"],
)
def test_missing_ranks_are_named_and_the_first_signal_ends_the_wait(
    tiny_world: Path, tmp_path: Path, variables: dict[str, str], missing: str, unset: str
) -> None:
    process = start(tiny_world, tmp_path, variables)
    deadline = time.monotonic() + 60
    while "goes on waiting" not in process.output:
        assert process.poll() is None, process.output
        assert time.monotonic() < deadline, process.output
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    said = process.output
    (line,) = [line for line in said.splitlines() if "goes on waiting" in line]
    assert missing in line
    assert line.endswith(f"If this process should run alone, {unset}")
    assert "stops waiting for rank" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_port_that_another_process_has_is_one_line(tiny_world: Path, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        process = start(tiny_world, tmp_path, left_over(0, port))
        assert process.wait(60) == 2
    (line,) = process.output.splitlines()
    assert line.startswith(f"opd-ds: error: MASTER_PORT = {port}: rank 0 on {socket.gethostname()} cannot use it (")
    assert "another process listens on this port" in line


@pytest.mark.parametrize(
    ("devices", "problem"),
    [
        (["GPU-1", "GPU-2"], None),
        (["", ""], None),
        (["GPU-1", "GPU-1"], "ranks 0 and 1 have the same GPU (GPU-1): start one process per GPU"),
    ],
)
def test_two_ranks_on_one_gpu_are_refused_on_both(
    devices: list[str], problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA_VISIBLE_DEVICES=0 left over in the shell: each rank sees one device, which may also be its own."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(unused_port()))

    def arrive(rank: int) -> str | None:
        try:
            stores.append(wait_for_ranks(World(rank, rank, 2, 2), devices[rank], timeout=20))
        except UserError as error:
            return str(error).partition(",")[0]
        return None

    stores: list[object] = []
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(arrive, range(2))) == [problem, problem]


def test_a_device_that_deepspeed_does_not_know(tiny_world: Path, tmp_path: Path) -> None:
    process = start(tiny_world, tmp_path, {"DS_ACCELERATOR": "gpu"})
    assert process.wait(60) == 2, process.output
    (line,) = [line for line in process.output.splitlines() if "error" in line]
    assert line.startswith("opd-ds: error: DS_ACCELERATOR = 'gpu': unset it, or choose one of cuda, cpu, ")


def test_gpus_that_a_variable_hides_are_mentioned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    comm._say_that_gpus_are_idle(World())
    assert "the run is on CPUs although there are GPUs here: DS_ACCELERATOR=cpu" in caplog.text
