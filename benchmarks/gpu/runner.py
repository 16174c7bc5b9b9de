"""Parts one after the other, within a time: what was found is on disk after each of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import worker
from benchmarks.gpu.parts import Part
from benchmarks.gpu.report import as_markdown
from opd_ds.config.paths import package_root

_FAST_FOLDER, _ROOM = Path("/dev/shm"), 24 * 2**30  # in memory where a real model's weights fit
_TO_REPORT = 4.0  # seconds kept back
_LAST_LINES = 15
OK, WRONG, FAILED, TIMED_OUT, NOT_RUN = "ok", "wrong", "failed", "timed out", "not run"


@dataclass(frozen=True)
class _Worker:
    process: subprocess.Popen[bytes]
    log: Path


@dataclass
class _Runner:
    folder: Path
    scratch: Path
    size: str
    deadline: float
    patience: float
    module: str
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: int = 0

    def start(self) -> _Worker:
        """A worker that loads its libraries and waits."""
        self.started += 1
        file = self.scratch / f"worker{self.started}.log"
        packages = [str(package_root().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        with file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", self.module],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(packages)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # ended together with what it started
            )
        return _Worker(process, file)

    def run(self, part: Part, current: _Worker) -> dict[str, Any]:
        """Tell a waiting worker what to do, and wait for it."""
        process, out = current.process, self.scratch / f"{part.name}.json"
        seconds = min(part.limit * self.patience, self.deadline - time.monotonic())
        told = {
            "function": part.function,
            "out": str(out),
            "scratch": str(self.scratch),
            "results": str(self.folder),
            "size": self.size,
            "seconds": seconds,
            "earlier": {name: entry["checks"] for name, entry in self.found.items()},
        }
        started = time.monotonic()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(told).encode() + b"\n")
            process.stdin.close()
            process.wait(seconds)
            status = OK if process.returncode == 0 else FAILED
        except (subprocess.TimeoutExpired, BrokenPipeError) as error:
            status = TIMED_OUT if isinstance(error, subprocess.TimeoutExpired) else FAILED
        _end(process)
        took = round(time.monotonic() - started, 1)
        checks = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
        if status == OK and any("error" in check or check.get("ok") is False for check in checks.values()):
            status = WRONG
        text = current.log.read_text(encoding="utf-8", errors="replace")
        with (self.folder / "log.txt").open("a", encoding="utf-8") as logs:
            logs.write(f"==== {part.name}: {status}, {took} s ====\n{text}\n")
        entry = {"status": status, "seconds": took, "checks": checks}
        if status in (FAILED, TIMED_OUT):
            entry["error"] = text.splitlines()[-_LAST_LINES:]
        return entry

    def write(self, started: float, parts: Sequence[Part]) -> None:
        """What is known so far."""
        known = {part.name: {"what": part.what, **self.found[part.name]} for part in parts if part.name in self.found}
        data = {"size": self.size, "seconds": round(time.monotonic() - started, 1), "parts": known}
        (self.folder / "gpu.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (self.folder / "gpu.md").write_text(as_markdown(data), encoding="utf-8")


def bench(
    parts: Sequence[Part],
    folder: Path,
    *,
    size: str,
    minutes: float,
    say: Callable[[str], None],
    patience: float = 1.0,
    module: str = worker.__name__,
) -> bool:
    """Run `parts` and write gpu.json, gpu.md, log.txt and what parts leave there; whether all that ran is right.

    Args:
        patience: factor on the parts' limits.
    """
    started = time.monotonic()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").unlink(missing_ok=True)
    with _scratch() as scratch:
        runner = _Runner(folder, scratch, size, started + 60 * minutes - _TO_REPORT, patience, module)
        waiting: _Worker | None = runner.start()
        try:
            for number, part in enumerate(parts, 1):
                if waiting is None or runner.deadline - time.monotonic() < part.expected:
                    runner.found[part.name] = {"status": NOT_RUN, "seconds": 0, "checks": {}}
                else:
                    current, waiting = waiting, runner.start() if number < len(parts) else None
                    runner.found[part.name] = runner.run(part, current)
                entry = runner.found[part.name]
                runner.write(started, parts)
                say(f"{part.name}: {entry['status']}, {entry['seconds']} s")
        finally:
            if waiting is not None:
                _end(waiting.process)
    say(f"table: {folder / 'gpu.md'}")
    return all(entry["status"] in (OK, NOT_RUN) for entry in runner.found.values())


@contextmanager
def _scratch() -> Any:
    in_memory = _FAST_FOLDER.is_dir() and shutil.disk_usage(_FAST_FOLDER).free > _ROOM
    with tempfile.TemporaryDirectory(prefix="opd_ds_gpu_", dir=_FAST_FOLDER if in_memory else None) as folder:
        yield Path(folder)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
