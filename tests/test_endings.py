"""A run ends with 0 only when it did what it was asked to do, whatever a library does; real processes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from opd_ds.cluster import failures
from opd_ds.cluster.failures import message, report_and_exit
from opd_ds.cluster.rendezvous import unused_port
from opd_ds.errors import UserError
from opd_ds.utils.disk_errors import disk_error
from tests.ranks import SET_BY_LAUNCHERS, fork
from tests.tiny import run_settings, write_config

# What a library may do in round 2 of 3, and what is said of it.
SCRIPT = """
import os, sys, threading
import opd_ds.cluster.watchdog
import opd_ds.training.trainer
from opd_ds.cli.main import main

opd_ds.cluster.watchdog.BEAT_SECONDS = 0.5
plain = opd_ds.training.trainer.Trainer.run_round

def in_thread(work):
    thread = threading.Thread(target=work, name="writer")
    thread.start()
    thread.join(30)

def run_round(self, index):
    if index == 1 and os.environ.get("RANK", "0") in {ranks!r}:
        {deed}
    return plain(self, index)

opd_ds.training.trainer.Trainer.run_round = run_round
sys.argv = ["opd-ds", "train", *sys.argv[1:]]
main()
"""
DEEDS = {
    "nothing": ("pass", ""),
    "exit": ("exit(0)", "exit(0) was called before the command was done"),
    "os._exit": ("os._exit(0)", "rank.py:17, before the command was done"),
    "end of file": ("raise EOFError('Ran out of input')", "a file ended too early: Ran out of input"),
    "thread": ("in_thread(lambda: {}['x'])", "thread 'writer' ended before the command was done: KeyError('x')"),
    "exit in a thread": ("in_thread(exit)", "thread 'writer' ended before the command was done: SystemExit(None)"),
}


def run(world: Path, folder: Path, deed: str, ranks: tuple[str, ...], count: int = 1) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of `count` ranks, of which `ranks` do the deed."""
    config = write_config(folder / "run.yaml", run_settings(world, folder / "out", rollout__steps=1))
    script = folder / "rank.py"
    script.write_text(SCRIPT.format(deed=DEEDS[deed][0], ranks=ranks))
    plain = {name: value for name, value in os.environ.items() if name not in SET_BY_LAUNCHERS}
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(unused_port())}
    processes = [
        fork(
            str(script), "--config", str(config), "--done-file", str(folder / "done"),
            environment=plain | (shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}),
        )
        for rank in range(count)
    ]  # fmt: skip
    return [process.wait(120) for process in processes], [process.output for process in processes]


@pytest.mark.extended
@pytest.mark.parametrize("deed", DEEDS)
def test_a_library_does_not_end_a_run_in_silence(tiny_world: Path, tmp_path: Path, deed: str) -> None:
    (code,), (said,) = run(tiny_world, tmp_path, deed, ("0",))
    expected = DEEDS[deed][1]
    assert code == (1 if expected else 0), said
    assert expected in said.splitlines()[-1]
    assert (tmp_path / "done").exists() == (code == 0)


@pytest.mark.extended
@pytest.mark.multirank
@pytest.mark.parametrize("ranks", [("1",), ("0", "1")], ids=["one", "all"])
@pytest.mark.parametrize("deed", ["exit", "os._exit"])
def test_ranks_that_are_ended_all_say_failure(
    tiny_world: Path, tmp_path: Path, deed: str, ranks: tuple[str, ...]
) -> None:
    codes, outputs = run(tiny_world, tmp_path, deed, ranks, count=2)
    assert codes == [1, 1], outputs
    assert "".join(outputs).count("EndedEarlyError: ") == 1
    assert not (tmp_path / "done").exists()


def test_a_full_disk_is_one_line_whoever_writes(tmp_path: Path) -> None:
    """Neither safetensors nor copytree has the disk's errno: an export to a full disk must not end with a traceback."""
    with pytest.raises(SafetensorError) as caught:
        save_file({"a": torch.ones(2)}, tmp_path / "no folder" / "a.safetensors")
    found = disk_error(caught.value)
    assert found is not None
    assert found.errno == errno.ENOENT
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert message(full) == "opd-ds: error: could not write: No space left on device; the last checkpoint is intact"
    copied = shutil.Error([("a", "b", str(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a")))])
    assert message(copied) == message(full)
    assert "failed" in message(SafetensorError("Error while deserializing header"))


def test_a_rank_that_is_no_number_does_not_hide_the_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setattr(failures, "_watchdog", lambda: None)
    monkeypatch.setattr(failures, "_end", sys.exit)
    with pytest.raises(SystemExit) as ended:
        report_and_exit(UserError("RANK = 'x': needs a number"))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "opd-ds: error: RANK = 'x': needs a number\n"


def test_a_reader_that_leaves_is_no_failure() -> None:
    """`opd-ds train --help | head -1`: rich ends the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "opd_ds.cli", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == b""
