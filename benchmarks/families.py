"""`python -m benchmarks families`: what is measured of every model family, as a table.

Everything is small and random: the table says that a family is wired as diffusers' pipeline is, trains and comes back,
nothing about images.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.family_trial import KINDS, Trial
from benchmarks.ranks import outside_of_ranks
from opd_ds.config.paths import package_root
from opd_ds.errors import UserError, nearest
from opd_ds.models import FAMILIES
from opd_ds.testing.train_many import said, under_launcher
from opd_ds.utils.markdown import markdown_table

TOLERANCE = 1e-4
PLAN_TOLERANCE = 0.15
RANKS = 2
RUNS_FOLDER = "tiny_runs"
_START_SECONDS, _RUN_SECONDS = 600.0, 300.0  # most that a process group may take

Row = dict[str, Any]


def bench_families(folder: Path, names: list[str], say: Callable[[str], None]) -> bool:
    """Measure the families `names` (all with a tiny pipeline where it is empty); `families.json` and `families.md`.

    Returns:
        whether none failed. What a family has written is under `folder`/tiny_runs, which is replaced.

    Raises:
        UserError: a family that is not registered or has no tiny pipeline.
    """
    names = names or [name for name in FAMILIES if _has_tiny(name)]
    for name in names:
        if name not in FAMILIES or not _has_tiny(name):
            known = [known for known in FAMILIES if _has_tiny(known)]
            raise UserError(f"--family {name}: unknown; allowed: {', '.join(known)}.{nearest(name, known)}")
    runs = folder.resolve() / RUNS_FOLDER
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    trials = [Trial(name, runs / name) for name in names]
    rows: list[Row] = [{"family": name, "error": None} for name in names]
    pairs = list(zip(trials, rows, strict=True))
    for trial, row in pairs:
        say(f"{trial.name}: against diffusers")
        _note(_draw, trial, row)
    ready = [(trial, row) for trial, row in pairs if row["error"] is None]
    say(f"{len(ready) * len(KINDS)} runs of one round on {RANKS} ranks, ZeRO-3")
    ended = train_all([trial.config(kind) for trial, _ in ready for kind in KINDS], runs)
    for trial, row in ready:
        row["zero3"] = {kind: ended[trial.config(kind)] for kind in KINDS}
        say(f"{trial.name}: exports")
        _note(_load_back, trial, row)
    text = as_markdown(rows)
    (folder / "families.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (folder / "families.md").write_text(text, encoding="utf-8")
    say(text)
    return all(row["error"] is None for row in rows)


def _has_tiny(name: str) -> bool:
    return find_spec(f"opd_ds.testing.tiny.{name}") is not None


def _note(work: Callable[[Trial, Row], None], trial: Trial, row: Row) -> None:
    """A family that fails, however it does, says so in its row and stops no other."""
    try:
        work(trial, row)
    except Exception as error:
        row["error"] = said(error)


def _draw(trial: Trial, row: Row) -> None:
    trial.write()
    row["parity"] = trial.distance_to_diffusers()
    row["bf16"] = trial.bf16_difference()
    row["finite"] = trial.finite_at_both_ends()
    row["plan_error"] = trial.plan_error()
    _within("parity with diffusers", row["parity"])
    if not row["finite"]:
        raise ValueError("a velocity at sigma 1 or 0 is not finite")
    if abs(row["plan_error"]) > PLAN_TOLERANCE:
        raise ValueError(f"the plan is off by {row['plan_error']:+.0%} in what a row keeps for its backward")


def _load_back(trial: Trial, row: Row) -> None:
    for kind in KINDS:
        problem = row["zero3"][kind].get("error")
        if problem:
            raise RuntimeError(f"{kind} round: {problem}")
    row["export"] = {kind: trial.distance_of_export(kind) for kind in KINDS}
    for kind, distance in row["export"].items():
        _within(f"{kind} export", distance)


def _within(what: str, distance: float) -> None:
    if not distance <= TOLERANCE:  # NaN is not
        raise ValueError(f"{what}: latents differ by {distance:.2g}, more than {TOLERANCE:g}")


# ---- the runs ----


def train_all(configs: list[Path], folder: Path) -> dict[Path, dict[str, Any]]:
    """Train every config on `RANKS` processes of the deepspeed launcher, in as few process groups as failures allow.

    Returns:
        by config, `{"seconds": ...}` or `{"error": ...}`. Logs are in `folder`.
    """
    ended: dict[Path, dict[str, Any]] = {}
    waiting = list(configs)
    while waiting:
        log = folder / f"ranks-{len(configs) - len(waiting)}.log"
        problem = _run_group(waiting, log)
        while waiting and waiting[0].with_suffix(".json").is_file():
            config = waiting.pop(0)
            ended[config] = json.loads(config.with_suffix(".json").read_text(encoding="utf-8"))
            if "error" in ended[config]:
                break
        else:
            if waiting:  # it could not even say so itself
                ended[waiting.pop(0)] = {"error": f"{problem}; see {log}"}
    return ended


def _run_group(configs: list[Path], log: Path) -> str:
    """Start one process group and wait for its end; says how it ended."""
    packages = [str(package_root().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = outside_of_ranks() | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(packages),
    }
    command = [*under_launcher(RANKS), "--module", "opd_ds.testing.train_many", *map(str, configs)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    seconds = _START_SECONDS + len(configs) * _RUN_SECONDS
    try:
        return f"the ranks ended with exit code {process.wait(seconds)}"
    except subprocess.TimeoutExpired:
        return f"the ranks had not ended after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# ---- the table ----


def as_markdown(rows: list[Row]) -> str:
    """The table, with what its columns mean."""
    head = ["family", "parity", "ZeRO-3 full", "ZeRO-3 LoRA", "export full", "export LoRA", "bf16 loss", "finite"]
    cells = []
    for row in rows:
        zero3, export = row.get("zero3", {}), row.get("export", {})
        cells.append(
            [
                row["family"],
                _number(row.get("parity")),
                *(_round(zero3.get(kind)) for kind in KINDS),
                *(_number(export.get(kind)) for kind in KINDS),
                "-" if row.get("bf16") is None else f"{row['bf16']:.2%}",
                {True: "yes", False: "NO", None: "-"}[row.get("finite")],
                "-" if row.get("plan_error") is None else f"{row['plan_error']:+.1%}",
                row["error"] or "",
            ]
        )
    return (
        "# Model families, on tiny random pipelines\n\n"
        + markdown_table([*head, "plan error", "error"], cells, len(head) + 2)
        + "\n*parity*: largest difference between the latents of our `euler` rollout and of diffusers' pipeline, "
        "with guidance 1 and above. *ZeRO-3*: one round of `opd-ds train` on two ranks, all weights sharded; seconds "
        "with loading, checkpoint and export. *export*: largest difference between the latents that diffusers draws "
        "with what that run exported and those of its checkpoint here. *bf16 loss*: median relative difference to the "
        "loss in fp32 at the same states. *finite*: velocities at sigma 1 and 0, in fp32 and bf16. *plan error*: of "
        "the bytes that `opd-ds plan` expects a further row to keep for its backward; whole plans are compared with "
        "processes by `python -m benchmarks plan`. Differences above "
        f"{TOLERANCE:g} are errors.\n"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _round(ended: dict[str, Any] | None) -> str:
    if ended is None:
        return "-"
    return f"ok, {ended['seconds']:.1f} s" if "seconds" in ended else "failed"
