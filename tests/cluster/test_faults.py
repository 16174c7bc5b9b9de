"""Jobs on two nodes under what clusters do to them.

No round is lost beyond the last checkpoint, no run starts over in silence, and the numbers are those of a run to which
nothing happened.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd_ds.checkpoint.store import latest_checkpoint
from opd_ds.config.paths import package_root
from tests.cluster.conftest import Cluster
from tests.crash_trials import drafts
from tests.ranks import launch
from tests.runs import assert_close, metrics, wait_for_rounds
from tests.test_checkpoint import bit_flip
from tests.tiny import ALL_SHARDED, run_settings, write_config

SCRIPT = package_root().resolve().parent / "launchers" / "slurm_train.sbatch"
PATIENCE = 300  # seconds: a start of two ranks is a minute on busy cores


def uninterrupted(world: Path, folder: Path, rounds: int, **changes: object) -> list[dict[str, float]]:
    """The same run on two ranks of one machine."""
    settings = {"run__rounds": rounds, "run__checkpoint_every": rounds, **changes}
    launch(2, "--config", str(write_config(folder / "whole.yaml", run_settings(world, folder / "whole", **settings))))
    return metrics(folder / "whole")


@dataclass
class Survivor:
    """A job, and what was done to it."""

    cluster: Cluster
    job: str
    folder: Path
    faults: list[str]
    published: list[int]

    def after(self, rounds: int, fault: str, act: Callable[[], object]) -> None:
        """Let the job run some rounds, do it harm, wait until it runs again."""
        file = self.folder / "metrics.jsonl"
        wait_for_rounds(self.folder, len(file.read_text().splitlines()) + rounds if file.is_file() else rounds)
        self._harm(fault, act)

    def while_writing(self, fault: str, act: Callable[[], object], delay: float) -> None:
        """The same at a moment of the next checkpoint."""
        folder, deadline = self.folder / "checkpoints", time.monotonic() + PATIENCE
        leftovers = drafts(folder)
        while not drafts(folder) - leftovers:
            assert time.monotonic() < deadline, self.cluster.output(self.job)
            time.sleep(0.001)
        time.sleep(delay)
        self._harm(fault, act)

    def _harm(self, fault: str, act: Callable[[], object]) -> None:
        act()
        self.faults.append(fault)
        self.cluster.wait_for(self.job, ("PENDING", "RUNNING"), timeout=PATIENCE, restarts=len(self.faults))
        newest = latest_checkpoint(self.folder / "checkpoints")  # of before: the next start takes much longer than this
        self.published.append(0 if newest is None else int(newest.name[-6:]))
        self.cluster.restore_nodes()
        self.cluster.wait_for(self.job, "RUNNING", timeout=PATIENCE, restarts=len(self.faults))

    def check_starts(self) -> None:
        """Every fault was followed by a start from the checkpoint that was the newest then, and one start was fresh.

        There may be more starts than faults: SLURM clears away a dead node's step late, and ends the next one with it.
        """
        text = self.cluster.output(self.job)
        said = re.findall(r"resumed from .*?, (\d+) rounds done|starting with round 1", text)
        starts = [int(start or 0) for start in said]
        assert starts == sorted(starts), text
        assert starts.count(0) == 1
        assert set(self.published) <= set(starts), (self.published, text)


SOME = ("scancel --signal=USR1", "node n2 dies", "kill -9 of rank 0 while writing")
ALL = (
    "scancel --signal=USR1",
    "kill -9 of rank 1",
    "node n2 dies",
    "scancel --batch --signal=USR1",
    "kill -9 of rank 0 while writing",
    "kill -9 of rank 1 while writing",
    "scontrol requeue",
)


@pytest.mark.parametrize("faults", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_job_survives(
    cluster: Cluster,
    tiny_world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    faults: tuple[str, ...],
) -> None:
    rounds = 6 * len(faults)
    settings = {"run__rounds": rounds, "run__checkpoint_every": 3}
    config = write_config(tmp_path / "run.yaml", run_settings(tiny_world, tmp_path / "out", **settings))
    tasks = ("-N", "2", "--ntasks-per-node=1", f"--chdir={tmp_path}")
    job = cluster.submit(*tasks, SCRIPT, "--config", config, cwd=tmp_path)
    run, chance = Survivor(cluster, job, tmp_path / "out", [], []), random.Random(1)

    def kill_rank(node: str) -> None:
        cluster.on(node, "pkill", "-9", "-f", "bin/opd-ds train")

    acts: dict[str, Callable[[], object]] = {
        "scancel --signal=USR1": lambda: cluster.cancel("--signal=USR1", job),
        "scancel --batch --signal=USR1": lambda: cluster.cancel("--batch", "--signal=USR1", job),
        "scontrol requeue": lambda: cluster.on("login", "scontrol", "requeue", job),
        "node n2 dies": lambda: cluster.kill_node("n2"),
        "kill -9 of rank 1": lambda: kill_rank("n2"),
        "kill -9 of rank 0 while writing": lambda: kill_rank("n1"),
        "kill -9 of rank 1 while writing": lambda: kill_rank("n2"),
    }
    for fault in faults:
        if fault.endswith("writing"):
            run.while_writing(fault, acts[fault], chance.uniform(0, 0.05))
        else:
            run.after(3, fault, acts[fault])
    assert cluster.wait_for(job, ("COMPLETED", "FAILED"), timeout=PATIENCE) == "COMPLETED", cluster.output(job)
    run.check_starts()
    assert metrics(tmp_path / "out") == uninterrupted(tiny_world, tmp_path, rounds)
    with capsys.disabled():
        print(f"\n{len(run.faults)} faults survived by job {job}: {'; '.join(run.faults)}")


@pytest.mark.slow  # on one machine: tests/test_checkpoint.py
def test_a_job_that_goes_back_does_so_once(cluster: Cluster, tiny_world: Path, tmp_path: Path) -> None:
    """SLURM gives a requeued job its first arguments again, `--resume PATH` among them."""
    settings = {"run__rounds": 3, "run__checkpoint_every": 1, "run__keep_checkpoints": 99}
    config = write_config(tmp_path / "run.yaml", run_settings(tiny_world, tmp_path / "out", **settings))
    tasks = ("-N", "1", "--ntasks-per-node=1", f"--chdir={tmp_path}")
    job = cluster.submit(*tasks, SCRIPT, "--config", config, cwd=tmp_path)
    assert cluster.wait_for(job, ("COMPLETED", "FAILED"), timeout=PATIENCE) == "COMPLETED", cluster.output(job)
    back = ("--set", "run.rounds=40", "--resume", tmp_path / "out" / "checkpoints" / "round-000001")
    job = cluster.submit(*tasks, SCRIPT, "--config", config, *back, cwd=tmp_path)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "out" / "checkpoints" / "round-000005").is_dir():
        assert time.monotonic() < deadline, cluster.output(job)
        time.sleep(0.05)
    cluster.cancel("--signal=USR1", job)
    assert cluster.wait_for(job, ("COMPLETED", "FAILED"), timeout=PATIENCE) == "COMPLETED", cluster.output(job)
    starts = [int(start) for start in re.findall(r"resumed from .*?, (\d+) rounds done", cluster.output(job))]
    assert len(starts) == 2, cluster.output(job)
    assert starts[0] == 1
    assert starts[1] >= 5
    assert len(list((tmp_path / "out" / "checkpoints").glob("abandoned-*"))) == 2


@pytest.mark.slow  # on one machine: tests/test_elastic.py
def test_a_job_goes_on_with_other_ranks_and_stages_and_over_a_damaged_shard(
    cluster: Cluster, tiny_world: Path, tmp_path: Path
) -> None:
    settings = {"run__checkpoint_every": 1, "run__keep_checkpoints": 9, "deepspeed": ALL_SHARDED}
    config = write_config(tmp_path / "run.yaml", run_settings(tiny_world, tmp_path / "out", **settings))

    def go_on(nodes: int, per_node: int, rounds: int, stage: str) -> str:
        tasks = ("-N", str(nodes), f"--ntasks-per-node={per_node}", f"--chdir={tmp_path}")
        wanted = ("--config", config, "--set", f"run.rounds={rounds}", "--set", f"deepspeed={stage}")
        job = cluster.submit(*tasks, SCRIPT, *wanted, cwd=tmp_path)
        assert cluster.wait_for(job, ("COMPLETED", "FAILED"), timeout=PATIENCE) == "COMPLETED", cluster.output(job)
        return cluster.output(job)

    go_on(2, 1, 3, ALL_SHARDED)
    bit_flip(tmp_path / "out" / "checkpoints" / "round-000003" / "shard-00001-of-00002.safetensors")
    said = go_on(1, 1, 4, "zero2")  # two ranks to one, stage 3 to 2
    assert "round-000003 is damaged (shard-00001-of-00002.safetensors is not what was written" in said
    assert "2 rounds done" in said
    assert "4 rounds done" in go_on(2, 2, 6, ALL_SHARDED)  # one rank to four, stage 2 to 3
    assert "6 rounds done" in go_on(2, 1, 7, "zero2")  # four ranks to two
    assert_close(metrics(tmp_path / "out"), uninterrupted(tiny_world, tmp_path, 7))


@pytest.mark.slow  # on one machine: tests/test_checkpoint.py
def test_a_disk_that_fills_up(cluster: Cluster, tiny_world: Path, tmp_path: Path) -> None:
    """The run ends with one clear line and no requeue; with room it goes on from the last checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    settings = {"run__rounds": 20, "run__checkpoint_every": 1, "run__keep_checkpoints": 1}
    config = write_config(tmp_path / "run.yaml", run_settings(tiny_world, disk / "out", **settings))

    def go_on() -> tuple[str, str]:
        tasks = ("-w", "n1", "--ntasks-per-node=2", f"--chdir={tmp_path}")
        job = cluster.submit(*tasks, SCRIPT, "--config", config, cwd=tmp_path)
        return cluster.wait_for(job, ("COMPLETED", "FAILED"), timeout=PATIENCE), cluster.output(job)

    # Room for two checkpoints of 1.3 MB, and a lump that takes the rest once there is one.
    cluster.on("n1", "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk)
    try:
        fill = (
            f"cd {disk}; while [ ! -d out/checkpoints/round-000003 ]; do sleep 0.05; done; head -c 8M /dev/zero >lump"
        )
        filling = cluster.start("n1", "bash", "-c", fill)
        state, said = go_on()
        filling.wait(10)
        assert state == "FAILED", said
        (line,) = {line for line in said.splitlines() if "opd-ds: error:" in line}
        assert "No space left on device" in line, said
        assert "Traceback" not in said
        names = cluster.on("n1", "ls", disk / "out" / "checkpoints").stdout.split()
        (kept,) = [name for name in names if name.startswith("round-")]
        cluster.on("n1", "rm", disk / "lump")
        state, said = go_on()
        assert state == "COMPLETED", said
        assert f"{int(kept[-6:])} rounds done" in said
        rows = cluster.on("n1", "cat", disk / "out" / "metrics.jsonl").stdout.splitlines()
        assert [json.loads(row)["loss"] for row in rows] == [
            row["loss"] for row in uninterrupted(tiny_world, tmp_path, 20)
        ]
    finally:
        cluster.on("n1", "umount", "-l", disk)
