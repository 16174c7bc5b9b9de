"""What finished jobs found, in one small file: a bench that takes a day of one core can be run in parts.

`keep` writes it from a folder of jobs; `restore` makes folders of it again, but for weights. So a job whose weights an
unfinished job needs is not restored: it runs again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.jobs import DONE_FILE, Job, same_job
from benchmarks.paper.plan import GRADIENTS
from opd_ds.evaluation.results import FORMAT, RESULTS_FILE, means, read_results
from opd_ds.runs.monitor import METRICS_FILE, SCORES_FILE, read_metrics
from opd_ds.runs.setup import EVALUATION_FOLDER
from opd_ds.utils.atomic_io import write_whole

_RESULTS = f"{EVALUATION_FOLDER}/{RESULTS_FILE}"
_SUMMED = ("passes/", "seconds/")


def keep(jobs: Sequence[Job], folder: Path, file: Path) -> None:
    """Write the finished ones of `jobs` into `file`, beside what it has.

    A job that is in it with these settings stays: what ran again did so for its weights, on another processor to other
    weights, and others in `file` were made from those of then.
    """
    records = _read(file)
    for job in jobs:
        place = folder / job.name
        known = job.name in records and same_job(job, records[job.name])
        if not known and (place / DONE_FILE).is_file():
            records[job.name] = json.loads((place / DONE_FILE).read_text(encoding="utf-8")) | {"found": _found(place)}
    lines = [f"{json.dumps(name)}: {json.dumps(record)}" for name, record in sorted(records.items())]
    write_whole(file, "{\n" + ",\n".join(lines) + "\n}\n")


def restore(jobs: Sequence[Job], folder: Path, file: Path) -> list[str]:
    """Make folders of those `jobs` in `file` that have the settings of now and are needed by no unfinished job; returns
    their names. What `folder` has already stays.
    """
    records = {name: record for name, record in _read(file).items()
               for job in jobs if job.name == name and same_job(job, record)}  # fmt: skip
    by_name = {job.name: job for job in jobs}

    def is_done(name: str) -> bool:
        return name in records or (folder / name / DONE_FILE).is_file()

    needed: set[str] = set()
    open_ends = [job.name for job in jobs if not is_done(job.name)]
    while open_ends:
        for name in by_name[open_ends.pop()].needs:
            if name not in needed and not (folder / name / DONE_FILE).is_file():
                needed.add(name)
                open_ends.append(name)
    restored = [name for name in records if name not in needed and not (folder / name / DONE_FILE).is_file()]
    for name in restored:
        place, record = folder / name, records[name]
        place.mkdir(parents=True, exist_ok=True)
        for path, content in record["found"].items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_text(_text(path, content), encoding="utf-8")
        done = {key: value for key, value in record.items() if key != "found"}
        (place / DONE_FILE).write_text(json.dumps(done) + "\n", encoding="utf-8")
    return restored


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _found(place: Path) -> dict[str, Any]:
    """By file, as much as tables and plots read of it."""
    found: dict[str, Any] = {}
    if scores := read_metrics(place / SCORES_FILE):
        found[SCORES_FILE] = scores
        found[METRICS_FILE] = _sums(read_metrics(place / METRICS_FILE), {row["round"] for row in scores})
    if (place / _RESULTS).is_file():
        of_sets = means(read_results(place / _RESULTS))
        found[_RESULTS] = {"format": FORMAT, "scores": _nested(of_sets, lambda mean: {"mean": round(mean, 6)})}
    gradients = f"{GRADIENTS}.json"
    if (place / gradients).is_file():
        found[gradients] = json.loads((place / gradients).read_text(encoding="utf-8"))
    return found


def _sums(rows: list[dict[str, Any]], scored: set[int]) -> list[dict[str, Any]]:
    """One row for each scored round, with passes and seconds of all rounds since the one before."""
    sums: list[dict[str, Any]] = []
    total: dict[str, Any] = {}
    for row in rows:
        for key in (key for key in row if key.startswith(_SUMMED)):
            total[key] = total.get(key, 0) + row[key]
        if row["round"] in scored:
            sums.append({"round": row["round"]} | {key: round(value, 3) for key, value in total.items() if value})
            total = {}
    return [{"passes/forward": 0, "passes/backward": 0} | row for row in sums]


def _nested(values: Any, change: Callable[[float], Any]) -> Any:
    return {key: _nested(one, change) for key, one in values.items()} if isinstance(values, dict) else change(values)


def _text(path: str, content: Any) -> str:
    lines = content if path.endswith(".jsonl") else [content]
    return "".join(json.dumps(line) + "\n" for line in lines)
