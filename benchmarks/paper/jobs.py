"""Jobs: commands in processes of their own, several at a time, in the order of their needs, each of them once.

A job has the folder `<output>/<name>` with its `log.txt`; when it has ended well, `done.json` says what was run. Paths
in arguments are relative to the output folder, in which jobs run: the whole folder can be moved.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ranks import outside_of_ranks
from opd_ds.config.paths import package_root
from opd_ds.errors import UserError

DONE_FILE, LOG_FILE = "done.json", "log.txt"
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """`python -m <module> <arguments>`.

    Attributes:
        needs: names of the jobs that have to be finished before.
        seconds: how long it is expected to take; only shown.
        settings: what else decides about what it does, such as the recipe that its arguments name.
    """

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    module: str = "opd_ds.cli"
    seconds: float = 0.0
    settings: str = ""

    @property
    def command(self) -> list[str]:
        return [self.module, *self.arguments]


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started: float


def run_jobs(jobs: Sequence[Job], folder: Path, parallel: int, say: Callable[[str], None]) -> None:
    """Run what is not finished yet, earlier jobs first, at most `parallel` at a time.

    When it ends early, for whatever reason, jobs that run are asked to save (SIGTERM) and waited for.

    Raises:
        UserError: a job failed, naming its log; or a finished job in `folder` had other arguments.
        ValueError: needs that no job fulfils.
    """
    done = {job.name for job in jobs if _finished(job, folder)}
    waiting = [job for job in jobs if job.name not in done]
    running: list[_Running] = []
    if done:
        say(f"{len(done)} of {len(jobs)} jobs are finished already")
    with _ended_by_sigterm():
        try:
            while waiting or running:
                ready = [job for job in waiting if done.issuperset(job.needs)]
                for job in ready[: parallel - len(running)]:
                    waiting.remove(job)
                    running.append(_start(job, folder))
                if not running:
                    raise ValueError(f"needs without a job: {[job.needs for job in waiting]}")
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    seconds = _finish(one, folder)
                    done.add(one.job.name)
                    left = sum(job.seconds for job in [*waiting, *(other.job for other in running)]) / parallel
                    say(
                        f"[{len(done)}/{len(jobs)}] {one.job.name}: {seconds / 60:.1f} min; about "
                        f"{left / 60:.0f} min left"
                    )
                time.sleep(_LOOK_SECONDS)
        finally:
            for one in running:
                one.process.terminate()
            for one in running:
                one.process.wait()


def _finished(job: Job, folder: Path) -> bool:
    file = folder / job.name / DONE_FILE
    if not file.is_file():
        return False
    done = json.loads(file.read_text(encoding="utf-8"))
    if not same_job(job, done):
        pairs = zip(done["command"], job.command, strict=False)
        unlike = "their number" if len(done["command"]) != len(job.command) else "the recipe"
        different = next((b for a, b in pairs if a != b), unlike)
        raise UserError(
            f"--output-dir {folder}: job {job.name} was finished with other settings (first difference: {different}); "
            "give another folder, or the options of that bench, or remove this job's folder"
        )
    return True


def same_job(job: Job, done: Mapping[str, Any]) -> bool:
    """Whether `done`, the contents of a `done.json`, is of this job as it is now."""
    return done["command"] == job.command and done.get("settings", "") == job.settings


def _start(job: Job, folder: Path) -> _Running:
    place = folder / job.name
    place.mkdir(parents=True, exist_ok=True)
    packages = [str(package_root().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = outside_of_ranks() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(packages)}
    with (place / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *job.command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the bench alone, which asks its jobs to save, once
        )
    return _Running(job, process, time.monotonic())


def _finish(one: _Running, folder: Path) -> float:
    """Remember that it ended well; returns its seconds."""
    place = folder / one.job.name
    if one.process.returncode != 0:
        raise UserError(
            f"job {one.job.name} ended with exit code {one.process.returncode}; see {place / LOG_FILE}, then start the "
            "same command again: what is finished is not repeated"
        )
    seconds = time.monotonic() - one.started
    draft = place / f".{DONE_FILE}"
    done = {"command": one.job.command, "settings": one.job.settings, "seconds": round(seconds, 1)}
    draft.write_text(json.dumps(done, indent=1) + "\n")
    draft.replace(place / DONE_FILE)
    return seconds


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is an exception: jobs must not outlive the bench, a second one would write into their folders."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
