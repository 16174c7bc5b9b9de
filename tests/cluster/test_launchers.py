"""The launchers on real SLURM and over real ssh, with a stub in place of the training: arguments, signals, restarts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd_ds.cluster.slurm import Job, batch_script
from opd_ds.config.paths import package_root
from tests.cluster.conftest import Cluster

LAUNCHERS = package_root().resolve().parent / "launchers"

# What the stub does: `wait` lasts until a signal, the first time; anything else is its exit code; with 2, rank 1 is
# slow to start. It ignores TERM once it has decided to leave, like a rank must: the first that leaves makes SLURM, or
# the launcher, end the others.
STUB = """
import json, os, signal, sys, time
from pathlib import Path

def leave(code):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if code == 0:
        Path(sys.argv[sys.argv.index("--done-file") + 1]).touch()
    os._exit(code)

rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
if os.environ["BEHAVE"] == "2" and rank == "1":
    time.sleep(3)
signal.signal(signal.SIGUSR1, lambda *_: leave(75))
signal.signal(signal.SIGTERM, lambda *_: ((record / f"saved.{rank}").touch(), leave(143)))
record, restarts = Path(os.environ["RECORD"]), os.environ.get("SLURM_RESTART_COUNT", "0")
arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
about = {"arguments": arguments, "environment": dict(os.environ), "host": os.uname().nodename, "folder": os.getcwd()}
(record / f"part.{rank}").write_text(json.dumps(about))
(record / f"part.{rank}").rename(record / f"{restarts}.{rank}")
if os.environ["BEHAVE"] != "wait":
    leave(int(os.environ["BEHAVE"]))
if restarts == "0":
    time.sleep(100)
    leave(9)
leave(0)
"""

EVIL = [
    "--set", "a=x y", "--set", "b=$(touch owned)", "--set", "c=`touch owned`;touch owned", "--set", "d='it''s'",
    "--set", 'e="q" \\ \\" %h %n %% #', "--set", "f=two\nlines\r\n\t", "--set", "g=Größe漢", "", "$HOME ~ * !x {a,b}",
    "--set", "plain.key=1e-4,2", "-n", "'; touch owned; '",
]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A folder of submission with a stub in it, and what the stub's processes have recorded."""

    folder: Path
    environment: dict[str, str]

    def recorded(self, ranks: int, restarts: int = 0, timeout: float = 180) -> list[dict[str, object]]:
        """Wait until all ranks of a start have recorded themselves."""
        files = [self.folder / "record" / f"{restarts}.{rank}" for rank in range(ranks)]
        end = time.monotonic() + timeout
        while not all(file.exists() for file in files):
            assert time.monotonic() < end, [file.name for file in files if not file.exists()]
            time.sleep(0.1)
        return [json.loads(file.read_text()) for file in files]

    def starts(self) -> int:
        return len(list((self.folder / "record").glob("*.0")))

    def saved(self, ranks: int, timeout: float = 60) -> None:
        """Wait until all ranks have left because of TERM."""
        end = time.monotonic() + timeout
        while len(left := list((self.folder / "record").glob("saved.*"))) < ranks:
            assert time.monotonic() < end, left
            time.sleep(0.1)

    def check_arguments(self, ranks: list[dict[str, object]], *expected: str) -> None:
        """All ranks have these, after what every launcher gives."""
        for rank in ranks:
            arguments = rank["arguments"]
            assert isinstance(arguments, list)
            assert arguments[:4] == ["train", "--resume", "auto", "--done-file"]
            assert arguments[5:] == list(expected)
            assert not Path(arguments[4]).exists()

    def check_untouched(self) -> None:
        assert not list(self.folder.rglob("owned"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for folder in ("record", "bin", "opd_ds"):
        (tmp_path / folder).mkdir()
    # `opd-ds` on PATH for srun; the module opd_ds.cli.main, found in the working folder first, for the other launchers.
    (tmp_path / "bin" / "opd-ds").write_text("#!/usr/bin/env -S python -S\n" + STUB)
    (tmp_path / "bin" / "opd-ds").chmod(0o755)
    (tmp_path / "opd_ds" / "__init__.py").touch()
    (tmp_path / "opd_ds" / "cli.py").write_text(STUB)
    (tmp_path / "opd_ds" / "cluster").mkdir()
    (tmp_path / "opd_ds" / "cluster" / "__init__.py").touch()
    (tmp_path / "opd_ds" / "cluster" / "rendezvous.py").write_text("print(29517)")
    return Place(tmp_path, {"RECORD": str(tmp_path / "record")})


@pytest.fixture
def submit(cluster: Cluster, place: Place) -> Callable[..., str]:
    def submit(
        behave: str,
        *arguments: str,
        script: str = "slurm_train.sbatch",
        options: tuple[str, ...] = (),
        launcher: str = "srun",
    ) -> str:
        environment = place.environment | {
            "BEHAVE": behave,
            "LAUNCHER": launcher,
            "PATH": f"{place.folder}/bin:{cluster.environment['PATH']}",
        }
        return cluster.submit(*options, LAUNCHERS / script, *arguments, env=environment, cwd=place.folder)

    return submit


def test_every_argument_reaches_every_rank_as_it_is(cluster: Cluster, place: Place, submit: Callable[..., str]) -> None:
    job = submit("0", *EVIL, options=("-N2", "--ntasks-per-node=2", "--cpus-per-task=3"))
    cluster.wait_for(job, "COMPLETED")
    ranks = place.recorded(4)
    place.check_arguments(ranks, *EVIL)
    assert [rank["host"] for rank in ranks] == ["n1", "n1", "n2", "n2"]
    assert {rank["folder"] for rank in ranks} == {str(place.folder)}
    for index, rank in enumerate(ranks):
        expected = {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": cluster.environment["TORCH_EXTENSIONS_DIR"],
            "SLURM_NTASKS": "4",
            "SLURM_LOCALID": str(index % 2),
            "SLURM_CPUS_PER_TASK": "3",
        }
        environment = rank["environment"]
        assert isinstance(environment, dict)
        assert {name: environment.get(name) for name in expected} == expected
    place.check_untouched()


def test_a_written_script_reaches_the_ranks_as_it_was_given(cluster: Cluster, place: Place) -> None:
    folder = place.folder / 'it\'s a "place"; $(touch owned) #'
    folder.mkdir()
    job_name = '"; touch owned; $(touch owned) \\'
    prologue = str(place.folder / "prologue.sh")
    text = batch_script(Job(EVIL, folder, nodes=2, job_name=job_name, prologue=prologue, log_dir="logs $(touch owned)"))
    (folder / "logs $(touch owned)").mkdir()
    script = place.folder / "job.sbatch"
    script.write_text(text)
    # Nothing of this shell reaches the job, which is left to the prologue.
    given = place.environment | {"BEHAVE": "0"}
    lines = [f"export {name}={value}\n" for name, value in given.items()]
    lines.append(f"PATH={place.folder}/bin:{cluster.environment['PATH']}\n")
    (place.folder / "prologue.sh").write_text("".join(lines))
    leak = {"RANK": "1", "SLURM_CPUS_PER_TASK": "5", "SBATCH_EXPORT": "NONE", "LEAK": "1", "BEHAVE": "9"}
    job = cluster.submit(script, env=leak, cwd=Path("/"))
    cluster.wait_for(job, ("COMPLETED", "FAILED"))
    ranks = place.recorded(2)
    assert not any(name in str(rank["environment"]) for rank in ranks for name in ("'RANK'", "'LEAK'"))
    place.check_arguments(ranks, *EVIL)
    assert {rank["folder"] for rank in ranks} == {str(folder)}
    assert f"JobName={job_name} " in cluster.on("login", "scontrol", "show", "job", "-o", job).stdout
    assert (folder / "logs $(touch owned)" / f"opd-ds-{job}.log").is_file()
    place.check_untouched()


@pytest.mark.parametrize("way", [["--batch", "--signal=USR1"], ["--signal=USR1"], ["--full", "--signal=USR1"]])
def test_usr1_puts_the_job_back_however_it_comes(
    way: list[str], cluster: Cluster, place: Place, submit: Callable[..., str]
) -> None:
    job = submit("wait", options=("-N2", "--ntasks-per-node=2"))
    place.recorded(4)
    cluster.cancel(*way, job)
    place.recorded(4, restarts=1)
    cluster.wait_for(job, "COMPLETED", restarts=1)
    assert f"the state is saved: job {job} goes back into the queue" in cluster.output(job)
    assert place.starts() == 2


@pytest.mark.slow
def test_the_time_limit_puts_the_job_back(cluster: Cluster, place: Place, submit: Callable[..., str]) -> None:
    # SLURM looks at limits now and then: a signal 50 s before a limit of one minute comes within seconds.
    job = submit("wait", options=("-N2", "--time=1", "--signal=B:USR1@50"))
    cluster.wait_for(job, "COMPLETED", restarts=1, timeout=180)
    assert place.starts() == 2


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, place: Place, submit: Callable[..., str]) -> None:
    job = submit("wait", options=("-N2",))
    place.recorded(2)
    cluster.cancel(job)
    cluster.wait_for(job, "CANCELLED")
    place.saved(2)
    time.sleep(1)
    assert cluster.job_state(job) == "CANCELLED"
    assert "goes back into the queue" not in cluster.output(job)


def test_a_requeue_by_slurm_is_left_to_slurm(cluster: Cluster, place: Place, submit: Callable[..., str]) -> None:
    job = submit("wait", options=("-N2",))
    place.recorded(2)
    cluster.on("login", "scontrol", "requeue", job)
    place.recorded(2, restarts=1)
    cluster.wait_for(job, "COMPLETED", restarts=1)
    place.saved(2)
    assert "goes back into the queue" not in cluster.output(job)


def test_errors_end_the_job_and_losses_restart_it_so_often(
    cluster: Cluster, place: Place, submit: Callable[..., str]
) -> None:
    failed = submit("1", options=("-N1",))
    cluster.wait_for(failed, "FAILED")
    assert cluster.job(failed)["ExitCode"] == "1:0"
    assert place.starts() == 1
    slow = submit("2", options=("-N2",))
    cluster.wait_for(slow, "FAILED")
    assert cluster.job(slow)["ExitCode"] == "2:0"
    assert "goes back into the queue" not in cluster.output(slow)
    limited = (LAUNCHERS / "slurm_train.sbatch").read_text().replace("MAX_RESTARTS=3", "MAX_RESTARTS=1")
    (place.folder / "limited.sbatch").write_text(limited)
    lost = submit("76", script=str(place.folder / "limited.sbatch"), options=("-N1",))
    cluster.wait_for(lost, "FAILED", restarts=1)
    assert cluster.job(lost)["ExitCode"] == "76:0"
    assert place.starts() == 2
    said = cluster.output(lost)
    assert f"restart 1: job {lost} goes back into the queue" in said
    assert "exit code 76: a rank or a node was lost; 1 restarts since the last checkpoint, MAX_RESTARTS=1" in said


def test_the_deepspeed_launcher_in_an_allocation(cluster: Cluster, place: Place, submit: Callable[..., str]) -> None:
    job = submit("wait", *EVIL, launcher="deepspeed", options=("-N2", "--ntasks-per-node=2"))
    ranks = place.recorded(4)
    place.check_arguments(ranks, *EVIL)
    assert [rank["host"] for rank in ranks] == ["n1", "n1", "n2", "n2"]
    assert (place.folder / f".opd-ds-hostfile-{job}").read_text() == "n1 slots=2\nn2 slots=2\n"
    cluster.cancel("--batch", "--signal=USR1", job)
    place.recorded(4, restarts=1)
    cluster.wait_for(job, "COMPLETED", restarts=1)
    assert "exit code" not in cluster.output(job).replace("Exited with exit code 75", "")
    assert not (place.folder / f".opd-ds-hostfile-{job}").exists()
    place.check_untouched()


def test_a_hostfile_over_pdsh(cluster: Cluster, place: Place) -> None:
    (place.folder / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    # What the stub wants to know is nothing to the launcher; python's own variables always come through.
    stub_settings = place.environment | {"BEHAVE": "wait"}
    (place.folder / "sitecustomize.py").write_text(f"import os; os.environ.update({stub_settings!r})")
    hf_home = '/a b/%h $(touch owned) "x" \\'
    given = place.environment | {"HF_HOME": hf_home, "PYTHONPATH": str(place.folder), "TMPDIR": str(place.folder)}
    command = ("bash", "-c", 'echo $$ >pid; exec "$@"', "bash", str(LAUNCHERS / "hostfile_train.sh"), "hostfile", *EVIL)
    with cluster.start("login", *command, env=given, cwd=place.folder) as running:
        ranks = place.recorded(2)
        cluster.on("login", "kill", "-TERM", (place.folder / "pid").read_text().strip())
        running.communicate(timeout=120)
    place.saved(2)
    place.check_arguments(ranks, *EVIL)
    assert [rank["host"] for rank in ranks] == ["n1", "n2"]
    for rank in ranks:
        environment = rank["environment"]
        assert isinstance(environment, dict)
        assert environment["HF_HOME"] == hf_home
        assert environment["DS_ACCELERATOR"] == "cpu"
        assert environment["TORCH_EXTENSIONS_DIR"] == cluster.environment["TORCH_EXTENSIONS_DIR"]
    assert not list(place.folder.glob("tmp.*"))
    place.check_untouched()


def test_torchrun_on_two_nodes(cluster: Cluster, place: Place) -> None:
    environment = place.environment | {"BEHAVE": "wait", "PROCESSES": "1"}
    command = ("srun", "-N2", "--ntasks-per-node=1", str(LAUNCHERS / "torchrun_train.sh"), *EVIL)
    with cluster.start("login", *command, env=environment, cwd=place.folder) as running:
        ranks = place.recorded(2)
        place.check_arguments(ranks, *EVIL)
        assert {rank["host"] for rank in ranks} == {"n1", "n2"}
        step = cluster.on("login", "squeue", "-h", "-o", "%i").stdout.split()[0]
        cluster.cancel("--signal=USR1", step)
        output, _ = running.communicate(timeout=120)
    assert running.returncode == 1, output
    assert "exitcode  : 75" in output
