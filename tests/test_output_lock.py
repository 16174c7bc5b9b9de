"""Two runs never write one folder at the same time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from opd_ds.cli.dry_run import describe
from opd_ds.cluster.world import World
from opd_ds.config.loading import parse_config
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.runs.output_lock import LOCK_FILE, OutputLock, refuse_in_use
from opd_ds.runs.resume import Start
from opd_ds.runs.train import train
from opd_ds.training.trainer import RoundReport
from tests.runs import metrics
from tests.tiny import run_settings

IN_USE = r"run\.output_dir = '.*out': a run on .+ \(job 7, pid \d+, since 20.+\) writes here; wait for it, end it, or"
HOLDS = """
import sys, time
from pathlib import Path
from opd_ds.runs.output_lock import OutputLock
with OutputLock(0) as lock:
    lock.take(Path(sys.argv[1]))
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused(
    tiny_world: Path, tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By start and dry run alike, before a file of the first changes; afterwards the folder is free."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("opd_ds.runs.train.PATIENCE", 0.3)
    folder = tmp_path / "out"
    settings = run_settings(tiny_world, folder, run__rounds=2, run__checkpoint_every=1, trackers=[])
    config = parse_config(settings)
    tried: list[int] = []

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def start_again(report: RoundReport) -> None:
        before = files()
        for resume in ("never", "auto"):
            with pytest.raises(UserError, match=IN_USE):
                train(config, group, resume)
        with pytest.raises(UserError, match=IN_USE):
            describe(config, World(), Start("auto"))
        assert files() == before
        tried.append(report.round)

    train(config, group, callbacks=[start_again])
    assert tried == [1, 2]
    assert [row["round"] for row in metrics(folder)] == [1, 2]
    describe(config, World(), Start("auto"))
    train(config, group, "auto")


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    """A start that resumes waits for that."""
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"pid {holder.pid}, since"):
            refuse_in_use(tmp_path)
        threading.Timer(0.5, holder.send_signal, [signal.SIGKILL]).start()
        with OutputLock(30) as lock:
            lock.take(tmp_path)
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_look_writes_nothing(tmp_path: Path) -> None:
    refuse_in_use(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / LOCK_FILE).touch()
    with OutputLock(0) as lock:
        refuse_in_use(tmp_path)
        lock.take(tmp_path)
        (tmp_path / LOCK_FILE).write_text("")  # the holder has yet to say who it is
        with pytest.raises(UserError, match="another run writes here"):
            refuse_in_use(tmp_path)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with OutputLock(0) as lock:
        lock.take(tmp_path)
    assert caplog.text.count("this file system has no locks") == 1


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(UserError, match=rf"run\.output_dir = .*: {LOCK_FILE} cannot be used: Is a directory"):
        OutputLock(0).take(tmp_path)
