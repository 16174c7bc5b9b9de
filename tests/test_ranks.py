"""The forks that stand for ranks: each is a program of its own, and together they end as under a launcher."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.ranks import fork, launch, start

pytestmark = pytest.mark.multirank


def write_script(folder: Path, text: str) -> str:
    file = folder / "rank.py"
    file.write_text(f"import json, os, signal, sys, time\n{text}\n")
    return str(file)


def test_a_fork_is_a_program_that_was_just_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, environment, folder and session are its own; of the server it has the libraries, nothing else."""
    monkeypatch.chdir(tmp_path)
    script = write_script(
        tmp_path,
        "leads = os.getsid(0) == os.getpid()\n"
        "place = [os.environ['MINE'], 'HOME' in os.environ, os.getcwd(), leads]\n"
        "inside = ['torch' in sys.modules, len(os.listdir('/proc/self/task')), __name__]\n"
        "print(json.dumps([sys.argv, *place, *inside]))\n"
        "print('to the other', file=sys.stderr)\n"
        "raise SystemExit(7)",
    )
    process = fork(script, "a b", environment={"MINE": "x"})
    assert process.wait(60) == 7
    said, other = process.output.splitlines()
    assert json.loads(said) == [[script, "a b"], "x", False, str(tmp_path), True, True, 1, "__main__"]
    assert other == "to the other"


def test_an_error_has_its_trace_and_a_signal_its_number(tmp_path: Path) -> None:
    failed = fork(write_script(tmp_path, "raise KeyError('lost')"), environment=os.environ)
    assert failed.wait(60) == 1
    assert "KeyError: 'lost'" in failed.output
    killed = fork(write_script(tmp_path, "time.sleep(100)"), environment=os.environ)
    assert killed.poll(0.2) is None
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL


def test_the_first_rank_that_fails_ends_the_others_with_its_code(tmp_path: Path) -> None:
    script = write_script(tmp_path, "if os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(100)")
    ranks, started = start(3, script=script), time.monotonic()
    assert ranks.wait(60) == 3
    assert time.monotonic() - started < 30
    assert [process.returncode for process in ranks.processes] == [-signal.SIGTERM, 3, -signal.SIGTERM]


def test_ranks_that_do_not_end_are_killed_and_fail_the_test(tmp_path: Path) -> None:
    ranks = start(2, script=write_script(tmp_path, "print('waiting', flush=True)\ntime.sleep(100)"))
    with pytest.raises(AssertionError, match=r"running after 1 s:\n(.|\n)*waiting"):
        ranks.wait(1)
    assert {process.returncode for process in ranks.processes} == {-signal.SIGKILL}
    with pytest.raises(AssertionError, match="no such thing"):
        launch(1, script=write_script(tmp_path, "sys.exit('no such thing')"))
