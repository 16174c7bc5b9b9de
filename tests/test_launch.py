"""Who am I, how ranks without a port find one another, and what the launchers of one user hand on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
import torch

from opd_ds.cli import train as train_command
from opd_ds.cluster import watchdog
from opd_ds.cluster.rendezvous import agree_on_port, listener, ports, prepare_environment, set_local_rank
from opd_ds.cluster.world import World, detect_world, first_host, tasks_per_node
from opd_ds.config.loading import load_config
from opd_ds.errors import UserError
from tests.ranks import SET_BY_LAUNCHERS

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29501"}
TORCHRUN |= {"MASTER_ADDR": "n1", "TORCHELASTIC_RUN_ID": "abc"}
DEEPSPEED = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_SIZE": "2"}
DEEPSPEED |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in TORCHRUN.items() if "RANK" in name}
OPEN_MPI |= {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "n1"}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "gpu[003-004]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def srun(rank: int, local: int, node: int, per_node: str, tasks: int) -> dict[str, str]:
    """The variables of a task that srun started in the job of `BATCH`."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_TASKS_PER_NODE": per_node}
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
    return BATCH | step | place | {"SLURM_STEP_NODELIST": "gpu[003-004]"}


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World(0, 0, 1, 1)),
        (BATCH, World(0, 0, 1, 1)),  # the batch script itself is not a task
        (TORCHRUN, World(3, 1, 4, 2, "n1", 29501, "abc")),
        (DEEPSPEED, World(3, 1, 4, 2, "10.0.0.1", 29500)),
        (OPEN_MPI, World(3, 1, 4, 2, "n1", None)),
        (srun(3, 1, 1, "2(x2)", 4), World(3, 1, 4, 2, "gpu003", None, "77.0")),
        (srun(2, 0, 1, "2,1", 3), World(2, 0, 3, 1, "gpu003", None, "77.0")),
        (srun(1, 1, 0, "2", 2), World(1, 1, 2, 2, "127.0.0.1", None, "77.0")),
        (srun(0, 0, 0, "1(x2)", 2) | {"MASTER_PORT": "4000"}, World(0, 0, 2, 1, "gpu003", 4000, "77.0")),
        # a launcher that srun started once per node; which node it calls its first is its own affair
        (srun(0, 0, 0, "1(x2)", 2) | TORCHRUN, World(3, 1, 4, 2, "n1", 29501, "abc")),
        (srun(1, 0, 1, "1(x2)", 2) | DEEPSPEED, World(3, 1, 4, 2, "10.0.0.1", 29500, "77")),
        # a wrapper script that hands on what SLURM says
        (
            srun(3, 1, 1, "2(x2)", 4) | {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"},
            World(3, 1, 4, 2, "gpu003", None, "77"),
        ),
    ],
    ids=[
        "nothing", "batch script", "torchrun", "deepspeed", "open mpi", "srun", "srun, uneven", "srun, one node",
        "srun with a port", "torchrun in srun", "deepspeed in srun", "srun and a wrapper",
    ],
)  # fmt: skip
def test_from_the_environment(environment: dict[str, str], world: World) -> None:
    found = detect_world(environment)
    assert found.job or world.size == 1
    assert World(**vars(found) | {"job": world.job if not world.job else found.job}) == world
    freed = {name: value for name, value in environment.items() if name not in found.told_by.split()}
    assert detect_world(freed) == World()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK set but LOCAL_RANK, WORLD_SIZE not"),
        ({"RANK": "4", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, "RANK = 4 does not fit WORLD_SIZE = 4"),
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, "RANK = 'x': needs a number"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT = '0': needs a port"),
        (OPEN_MPI | {"MASTER_ADDR": ""}, "4 ranks on several nodes, but MASTER_ADDR is not set"),
        # left over from another shell: every task would be rank 0
        (
            srun(1, 0, 1, "1(x2)", 2) | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
            "RANK says rank 0 of 2, SLURM_PROCID says rank 1 of 2",
        ),
        # torchrun started once per task instead of once per node
        (srun(1, 1, 0, "2(x2)", 4) | TORCHRUN, "RANK says rank 3 of 4, SLURM_PROCID says rank 1 of 4"),
        (srun(1, 0, 1, "1(x2)", 2) | TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, "rank 0 of 1"),
        ({"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "n1"}, "LOCAL_WORLD_SIZE is not set"),
        (srun(0, 0, 0, "two", 2), "SLURM_STEP_TASKS_PER_NODE = 'two'"),
    ],
)
def test_contradictions(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        detect_world(environment)


def test_slurm_short_forms() -> None:
    nodelists = {"gpu[003-007,9],x1": "gpu003", "n1,n2": "n1", "r[1-2]n[3,4]": "r1n3", "login": "login"}
    assert {text: first_host(text) for text in nodelists} == nodelists
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


@pytest.mark.parametrize("environment", [OPEN_MPI, TORCHRUN | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"}])
def test_mpirun_and_we_say_the_same_local_rank(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """DeepSpeed asserts it; where a rank sees its own GPU only, that is number 0 although mpirun counts on."""
    monkeypatch.setattr(os, "environ", dict(environment) | {"PATH": os.environ["PATH"]})
    prepare_environment(World(3, 1, 4, 2, "n1", 29501, "job"))
    assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("1", "1")
    set_local_rank(0)
    assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("0", "0")


def test_without_mpirun_nothing_of_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    set_local_rank(2)
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ


@pytest.mark.parametrize(("local", "made"), [(0, True), (1, False)])
def test_a_run_that_srun_started_says_that_it_is_done(
    local: int, made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the environment has a launcher's variables too by then."""
    set_by_the_run = {"RANK": str(local), "LOCAL_RANK": str(local), "WORLD_SIZE": "2", "MASTER_ADDR": "n1"}
    for name in SET_BY_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in srun(local, local, 0, "2", 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "opd_ds.api.train", lambda *_, **__: [monkeypatch.setenv(*item) for item in set_by_the_run.items()]
    )
    done = tmp_path / "done"
    train_command._start(load_config("miniature", None, []), "never", [], done)
    assert done.exists() is made


# ---- launcher scripts, with stand-ins for the commands they call ----


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder for PATH: 4 GPUs, 32 cores; `deepspeed` shows its environment and what it was given."""
    done = '[ -n "$ENDED_EARLY" ] || { while [ "$1" != --done-file ]; do shift; done; touch "$2"; }'
    scripts = {
        "opd-ds": "",
        "nproc": "echo 32",
        "python": 'case "$*" in *device_count*) echo "${GPUS:-4}";; *) echo 29500;; esac',
        "deepspeed": f'echo "OMP_NUM_THREADS=$OMP_NUM_THREADS $*"; [ -z "$DS_ENV_FILE" ] || cat "$DS_ENV_FILE"; {done}',
        "torchrun": done,
        "pdsh": 'while [ "$1" != -w ]; do shift; done; shift 2; "$@"',
    }
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def ended(script: str, *arguments: str, commands: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "HOME": str(commands), **variables}
    file = Path(__file__).parents[1] / "launchers" / script
    return subprocess.run(
        ["bash", str(file), *arguments], env=environment, cwd=commands, capture_output=True, text=True
    )


def launched(script: str, *arguments: str, commands: Path, **variables: str) -> str:
    result = ended(script, *arguments, commands=commands, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("variables", "threads", "processes"),
    [
        ({}, 8, None),  # the launcher counts the GPUs itself
        ({"PROCESSES": "2"}, 16, "2"),
        ({"PROCESSES": "64"}, 1, "64"),
        ({"OMP_NUM_THREADS": "3"}, 3, None),
        ({"GPUS": "0"}, 32, "1"),
    ],
)
def test_the_processes_of_a_machine_share_its_cores(
    commands: Path, variables: dict[str, str], threads: int, processes: str | None
) -> None:
    told = launched("single_node.sh", "--recipe", "x", commands=commands, **variables)
    assert told.startswith(f"OMP_NUM_THREADS={threads} ")
    assert ("--num_accelerators" in told) == (processes is not None)
    assert processes is None or f"--num_accelerators {processes} " in told


def test_a_hostfile_launch_hands_settings_of_torch_and_triton_on(commands: Path) -> None:
    (commands / "hostfile").write_text("n1 slots=2\n")
    handed = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TRITON_CACHE_DIR": "/tmp/t"}
    handed |= {"TORCHINDUCTOR_CACHE_DIR": "/tmp/i", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCH_LOGS": "dynamo"}
    kept = {"CUDA_VISIBLE_DEVICES": "0", "TORCHELASTIC_RUN_ID": "other"}
    told = launched("hostfile_train.sh", "hostfile", "--recipe", "x", commands=commands, **handed, **kept)
    lines = told.splitlines()
    assert all(f"{name}={value}" in lines for name, value in handed.items())
    assert not any(line.startswith(tuple(kept)) for line in lines)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("single_node.sh", []), ("torchrun_train.sh", []), ("hostfile_train.sh", ["hostfile"])],
)
def test_a_launcher_that_ends_with_0_before_the_run_is_done_does_not(
    commands: Path, script: str, arguments: list[str]
) -> None:
    """As the deepspeed launcher does where its own process is killed."""
    (commands / "hostfile").write_text("n1 slots=2\nn2 slots=2\n")
    arguments += ["--recipe", "x"]
    assert ended(script, *arguments, commands=commands, TMPDIR=str(commands)).returncode == 0
    result = ended(script, *arguments, commands=commands, TMPDIR=str(commands), ENDED_EARLY="yes")
    assert result.returncode == 76
    assert result.stderr.splitlines()[-1].endswith("the run did not say that it is done: exit code 76")
    assert not [*commands.glob("tmp.*"), *commands.glob(".opd-ds-done*")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it names no host"),
        ("# n1 slots=8\n\n", "it names no host"),
        ("n1 slots=0\n", "line 1: n1 slots=0"),
        ("n1\n", "line 1: n1;"),
        ("n1 slots=8\nn2 slots = 8\n", "line 2: n2 slots = 8"),
        ("n1 slots=8\n\nn1 slots=4\n", "line 3: n1 is there already"),
    ],
)
def test_a_hostfile_is_read_before_anything_starts(commands: Path, text: str, problem: str) -> None:
    (commands / "hostfile").write_text(text)
    result = ended("hostfile_train.sh", "hostfile", "--recipe", "x", commands=commands)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"hostfile, {problem}")


def test_a_hostfile_may_have_comments_blank_lines_and_dos_line_ends(commands: Path) -> None:
    (commands / "hostfile").write_bytes(b"# ours\r\n\r\nn1 slots=2\r\nn2 slots=1 # slow\r\n")
    assert "--hostfile hostfile" in launched("hostfile_train.sh", "hostfile", "--recipe", "x", commands=commands)


# ---- what a hang leaves ----


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_a_hang_report_reads_the_recorder_that_has_entries(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """torch keeps NCCL's collectives apart from all others."""
    recorders = torch._C._distributed_c10d
    for name, own in (("_dump_nccl_trace_json", "nccl"), ("_dump_fr_trace_json", "gloo")):
        entries = [{"profiling_name": f"{own}:all_reduce"}] if own == backend else []
        dump = json.dumps({"version": "2.10"} | ({"entries": entries} if entries else {}))
        monkeypatch.setattr(recorders, name, lambda dump=dump: dump, raising=False)
    assert watchdog._collectives()["entries"] == [{"profiling_name": f"{backend}:all_reduce"}]


# ---- ports ----


def test_ports_are_the_jobs_own_and_the_same_everywhere() -> None:
    assert list(ports("77.0")) == list(ports("77.0"))
    assert list(islice(ports("77.0"), 3)) != list(islice(ports("78.0"), 3))
    assert all(1024 < port < 32768 for port in ports("77.0"))


def test_a_port_that_is_taken_is_passed_over() -> None:
    first, second = islice(ports("taken"), 2)
    with socket.create_server(("", first)), listener("taken") as found:
        assert found.getsockname()[1] == second


def test_launcher_scripts_can_ask_for_a_port() -> None:
    environment = {"SLURM_JOB_ID": "4242"}
    asked = subprocess.run(
        [sys.executable, "-m", "opd_ds.cluster.rendezvous"], env=environment, capture_output=True, text=True
    )
    assert int(asked.stdout) in list(ports("4242")), asked.stderr


def agreed(job: str, size: int, timeout: float = 20, address: str = "127.0.0.1") -> list[int]:
    """What each of `size` ranks, all on this host, takes for the port."""
    with ThreadPoolExecutor(size) as pool:
        worlds = [World(rank, rank, size, size, address, None, job) for rank in range(size)]
        return list(pool.map(lambda world: agree_on_port(world, timeout), worlds))


def test_ranks_agree_on_a_port() -> None:
    first, *others = agreed("agree", 4)
    assert others == [first] * 3


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_ranks_agree_where_rank_0_has_an_ipv6_address_only() -> None:
    first, second = agreed("six", 2, address="::1")
    assert first == second


def test_ranks_agree_although_strangers_hold_the_first_ports() -> None:
    """One that is silent, one that talks about something else, one that is another job's rank 0."""
    silent, talks, other = islice(ports("strangers"), 3)

    def answer(server: socket.socket, text: bytes) -> None:
        while True:
            try:
                visitor, _ = server.accept()
            except OSError:
                return
            visitor.sendall(text)
            visitor.close()

    with (
        socket.create_server(("", silent)),
        socket.create_server(("", talks)) as web,
        socket.create_server(("", other)) as job,
    ):
        threading.Thread(target=answer, args=(web, b"HTTP/1.1 400 Bad Request"), daemon=True).start()
        threading.Thread(target=answer, args=(job, b"opd-ds another 1234"), daemon=True).start()
        first, second = agreed("strangers", 2)
    assert first == second
    assert first not in (silent, talks, other, 1234)


def test_a_visitor_who_gives_up_keeps_nobody_out() -> None:
    """Rank 0 may be busy loading libraries; who knocked in vain is still in the queue, and comes again."""
    port = agree_on_port(World(0, 0, 3, 3, "127.0.0.1", None, "impatient"))
    door = next(ports("impatient"))
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", door)) as visit:
            visit.sendall(b"opd-ds impatient")
    others = [agree_on_port(World(rank, rank, 3, 3, "127.0.0.1", None, "impatient"), 20) for rank in (1, 2)]
    assert others == [port, port]


def test_no_rank_0_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1, 1, 2, 2, "127.0.0.1", None, "nobody")
    with pytest.raises(UserError, match=r"rank 1 of 2 has waited 1 s for rank 0 of job 'nobody' on 127\.0\.0\.1\. "):
        agree_on_port(world, timeout=1)
