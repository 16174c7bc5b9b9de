"""The miniature trains under every launcher on two nodes, and its numbers are those of a run on one machine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from opd_ds.config.paths import package_root
from tests.cluster.conftest import Cluster
from tests.ranks import launch
from tests.runs import assert_close, metrics

LAUNCHERS = package_root().resolve().parent / "launchers"
TASKS = ("text", "composition", "look")


def arguments(folder: Path) -> list[str]:
    """Three rounds of the shipped recipe; no final evaluation, which is the same code on any machine."""
    settings = {"run.rounds": "3", "run.output_dir": str(folder), "evaluation.baselines": "false"}
    settings |= {"rollout.samples": "4"} | {f"tasks.{task}.eval_prompts": "null" for task in TASKS}
    return ["--recipe", "miniature", *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, float]]]:
    """Metrics of runs on one machine, by number of ranks."""
    folder = tmp_path_factory.mktemp("local")
    for ranks in (2, 4):
        launch(ranks, *arguments(folder / str(ranks)))
    return {ranks: metrics(folder / str(ranks)) for ranks in (2, 4)}


@pytest.mark.parametrize(
    ("launcher", "per_node"),
    [
        pytest.param("srun", 1, marks=pytest.mark.slow),
        ("srun", 2),
        ("deepspeed", 1),
        pytest.param("deepspeed", 2, marks=pytest.mark.slow),
    ],
)
def test_in_a_slurm_allocation(
    cluster: Cluster, tmp_path: Path, local: dict[int, list[dict[str, float]]], launcher: str, per_node: int
) -> None:
    tasks = ["-N", "2", f"--ntasks-per-node={per_node}", f"--chdir={tmp_path}"]
    script = LAUNCHERS / "slurm_train.sbatch"
    job = cluster.submit(*tasks, script, *arguments(tmp_path / "out"), env={"LAUNCHER": launcher}, cwd=tmp_path)
    assert cluster.wait_for(job, ("COMPLETED", "FAILED"), timeout=240) == "COMPLETED", cluster.output(job)
    assert metrics(tmp_path / "out") == local[2 * per_node]


@pytest.mark.parametrize("launcher", ["srun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_teachers_on_ranks_of_their_own(
    cluster: Cluster, tmp_path: Path, local: dict[int, list[dict[str, float]]], launcher: str
) -> None:
    """The second node's two ranks have the teachers; the first one's learn what two ranks alone learn."""
    tasks = ["-N", "2", "--ntasks-per-node=2", f"--chdir={tmp_path}"]
    settings = [*arguments(tmp_path / "out"), "--set", "scoring.ranks=2"]
    job = cluster.submit(*tasks, LAUNCHERS / "slurm_train.sbatch", *settings, env={"LAUNCHER": launcher}, cwd=tmp_path)
    assert cluster.wait_for(job, ("COMPLETED", "FAILED"), timeout=240) == "COMPLETED", cluster.output(job)
    assert_close(metrics(tmp_path / "out"), local[2], 1e-5)


@pytest.mark.parametrize("per_node", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_with_a_hostfile_over_ssh(
    cluster: Cluster, tmp_path: Path, local: dict[int, list[dict[str, float]]], per_node: int
) -> None:
    (tmp_path / "hostfile").write_text(f"n1 slots={per_node}\nn2 slots={per_node}\n")
    command = [LAUNCHERS / "hostfile_train.sh", "hostfile", *arguments(tmp_path / "out")]
    cluster.on("login", *command, cwd=tmp_path, timeout=240)
    assert metrics(tmp_path / "out") == local[2 * per_node]


def test_with_torchrun_on_two_nodes(cluster: Cluster, tmp_path: Path, local: dict[int, list[dict[str, float]]]) -> None:
    place = {"NNODES": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29555", "PROCESSES": "1"}
    command = [LAUNCHERS / "torchrun_train.sh", *arguments(tmp_path / "out")]
    second = cluster.start("n2", *command, env=place | {"NODE_RANK": "1"}, cwd=tmp_path)
    cluster.on("n1", *command, env=place | {"NODE_RANK": "0"}, cwd=tmp_path, timeout=240)
    assert second.wait(30) == 0
    assert metrics(tmp_path / "out") == local[2]


@pytest.mark.slow
def test_with_torchrun_in_an_allocation(
    cluster: Cluster, tmp_path: Path, local: dict[int, list[dict[str, float]]]
) -> None:
    """torchrun within srun: rank, world and node come from torchrun, although SLURM's variables are there too."""
    command = ["srun", "-N2", "--ntasks-per-node=1", LAUNCHERS / "torchrun_train.sh", *arguments(tmp_path / "out")]
    cluster.on("login", *command, env={"PROCESSES": "1"}, cwd=tmp_path, timeout=240)
    assert metrics(tmp_path / "out") == local[2]


@pytest.mark.slow
def test_on_a_single_node(tmp_path: Path, local: dict[int, list[dict[str, float]]]) -> None:
    command = ["bash", str(LAUNCHERS / "single_node.sh"), *arguments(tmp_path / "out")]
    environment = os.environ | {"PROCESSES": "2", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert metrics(tmp_path / "out") == local[2]


@pytest.mark.slow
def test_the_doctor_examines_an_allocation(cluster: Cluster, tmp_path: Path) -> None:
    command = ["srun", "-N2", "--ntasks-per-node=1", "opd-ds", "doctor", "--json", *arguments(tmp_path)]
    said = cluster.on("login", *command, cwd=tmp_path, timeout=240).stdout
    report = json.loads(said[said.index("{\n") : said.rindex("}") + 1])
    assert report["ok"], report
    assert report["hosts"] == ["n1", "n2"]
    found = {finding["what"]: finding["found"] for finding in report["findings"]}
    assert found["all-reduce"] == "sum right over 2 ranks (gloo)"
    assert "all ranks see what rank 0 writes" in found["same output folder"]
    assert found["clocks"].endswith("ms apart")


@pytest.mark.slow
def test_the_doctor_over_ssh(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    command = ["deepspeed", "--hostfile", "hostfile", "--module", "opd_ds.cli", "doctor", "--output-dir", tmp_path]
    said = cluster.on("login", *command, cwd=tmp_path, timeout=240).stdout
    assert "2 ranks on 2 nodes: no problem found" in said
