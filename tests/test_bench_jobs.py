"""Jobs of a benchmark: what they wait for, what is not repeated, how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.paper.jobs import Job, run_jobs
from opd_ds.errors import UserError

SCRIPT = """
import sys, time, pathlib
name, *fate = sys.argv[1:]
with open("order.txt", "a") as stream: stream.write(f"start {name}\\n")
print("working on", name)
time.sleep(float(fate[1]) if len(fate) > 1 else 0)
if fate and fate[0] == "fail": sys.exit("it broke")
with open("order.txt", "a") as stream: stream.write(f"end {name}\\n")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "work_of_a_job.py").write_text(SCRIPT)
    return tmp_path


def job(name: str, *needs: str, fate: tuple[str, ...] = ()) -> Job:
    return Job(name, (name, *fate), needs, module="work_of_a_job")


def order(place: Path) -> list[str]:
    file = place / "order.txt"
    return file.read_text().splitlines() if file.is_file() else []


def quiet(text: str) -> None:
    pass


def test_jobs_wait_for_what_they_need(place: Path) -> None:
    told: list[str] = []
    run_jobs([job("last", "b", "a"), job("b", "a"), job("a"), job("free")], place, 2, told.append)
    lines = order(place)
    assert lines.index("end a") < lines.index("start b")
    assert lines.index("end b") < lines.index("start last")
    assert len(lines) == 8
    assert (place / "a" / "log.txt").read_text() == "working on a\n"
    assert [line.split("]")[0] for line in told] == ["[1/4", "[2/4", "[3/4", "[4/4"]


def test_a_job_is_no_rank_of_the_process_that_starts_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    (place / "says.py").write_text("import os; print(os.environ.get('MASTER_PORT'), os.environ['OMP_NUM_THREADS'])")
    run_jobs([Job("alone", (), module="says")], place, 1, quiet)
    assert (place / "alone" / "log.txt").read_text() == "None 1\n"


def test_two_jobs_run_at_a_time_and_no_more(place: Path) -> None:
    run_jobs([job(name, fate=("ok", "0.5")) for name in "abc"], place, 2, quiet)
    running, most = 0, 0
    for line in order(place):
        running += 1 if line.startswith("start") else -1
        most = max(most, running)
    assert most == 2


def test_finished_jobs_are_not_repeated_and_a_failure_names_its_log(place: Path) -> None:
    broken = [job("a"), job("b", "a", fate=("fail",)), job("c", "b")]
    with pytest.raises(UserError, match=r"job b ended with exit code 1; see .*b/log\.txt"):
        run_jobs(broken, place, 1, quiet)
    assert "it broke" in (place / "b" / "log.txt").read_text()
    assert "start c" not in order(place)
    (place / "order.txt").unlink()
    run_jobs([job("a"), job("b", "a"), job("c", "b")], place, 1, quiet)
    assert order(place) == ["start b", "end b", "start c", "end c"]
    (place / "order.txt").unlink()
    run_jobs([job("a"), job("b", "a"), job("c", "b")], place, 1, quiet)
    assert order(place) == []


def test_other_settings_are_not_taken_for_finished(place: Path) -> None:
    run_jobs([job("a")], place, 1, quiet)
    with pytest.raises(UserError, match=r"job a was finished with other settings .*other"):
        run_jobs([job("a", fate=("other",))], place, 1, quiet)


def test_needs_that_nobody_fulfils(place: Path) -> None:
    with pytest.raises(ValueError, match="needs without a job"):
        run_jobs([job("a", "gone")], place, 1, quiet)


def test_sigterm_ends_the_jobs_too(place: Path) -> None:
    code = (
        "import pathlib; from benchmarks.paper.jobs import Job, run_jobs\n"
        "run_jobs([Job('a', ('a', 'ok', '60'), module='work_of_a_job')], pathlib.Path('.'), 1, print)"
    )
    checkout = str(Path(__file__).parents[1])  # benchmarks are run from one
    process = subprocess.Popen([sys.executable, "-c", code], cwd=place, env=os.environ | {"PYTHONPATH": checkout})
    deadline = time.monotonic() + 30
    while not order(place) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert order(place) == ["start a"]
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    (child,) = [int(pid) for pid in children.stdout.split()]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not (place / "a" / "done.json").exists()


def test_a_recipe_that_changed_is_noticed(place: Path) -> None:
    run_jobs([replace(job("a"), settings="then")], place, 1, quiet)
    with pytest.raises(UserError, match=r"job a was finished with other settings \(first difference: the recipe\)"):
        run_jobs([replace(job("a"), settings="now")], place, 1, quiet)
    with pytest.raises(UserError, match=r"first difference: their number"):
        run_jobs([job("a", fate=("more",))], place, 1, quiet)
