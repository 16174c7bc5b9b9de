"""Do teachers on ranks of their own pay, and does the plan's simulation of such a round say what is measured?

    python -m benchmarks teacher-ranks --output-dir runs/teacher-ranks

Four ranks of one machine, a tiny random network, and teachers that sleep for so many milliseconds a row of their
forwards, as if they were larger. Once all ranks train and ask their teachers, once one of them holds the teachers and
the others train (`scoring.ranks: 1`), the latter also with `scoring.late: 1`.

On fewer cores than ranks three ranks train as fast as four do, while four sleep in a quarter of the time of one: that
is the case in which a split pays. Where a fourth rank makes training faster by a third, it cannot.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_ds.cluster.rendezvous import prepare_environment
from opd_ds.cluster.world import detect_world

if TYPE_CHECKING:
    from opd_ds.training.trainer import RoundReport

RANKS, ROUNDS, WARM = 4, 8, 2
MILLISECONDS = (0.0, 2.0, 5.0, 10.0)  # of a row
SAMPLES, STEPS, MICRO_BATCH = 12, 4, 4
TASKS = ("one", "two")


def bench(folder: Path, say: Callable[[str], None]) -> None:
    """Writes teacher_ranks.json and teacher_ranks.md in `folder`, and prints the table."""
    from benchmarks.ranks import run_ranks
    from opd_ds.miniature.networks import Sizes
    from opd_ds.testing.tiny import sd3
    from opd_ds.utils.atomic_io import write_whole
    from opd_ds.utils.markdown import markdown_table

    folder.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(layers=2, head_dim=16, text_width=32, vae_channels=(8, 8))
    for seed, name in enumerate(("base", *TASKS)):
        sd3.write(folder / name, seed, sizes)
    (folder / "prompts.txt").write_text("\n".join(sd3.PROMPTS) + "\n")
    for ranks in (0, 1):
        spec = {
            "ranks": ranks,
            "runs": {
                f"{ranks}-{late}-{pause:g}": {"config": _config(folder, ranks, late, pause), "pause": pause}
                for late in range(ranks + 1)
                for pause in MILLISECONDS
            },
        }
        file = folder / f"spec-{ranks}.json"
        file.write_text(json.dumps(spec))
        environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        run_ranks(
            __name__, [str(file), str(folder / f"found-{ranks}.json")], RANKS, folder / f"logs-{ranks}", environment
        )
    found: dict[str, Any] = {}
    for ranks in (0, 1):
        found |= json.loads((folder / f"found-{ranks}.json").read_text())
    rows = [_row(found, pause) for pause in MILLISECONDS]
    columns = (
        "ms a row", "all train", "of these scoring", "teacher rank: measured", "simulated", "gain", "late: measured",
        "simulated", "gain",
    )  # fmt: skip
    text = markdown_table(columns, rows)
    write_whole(folder / "teacher_ranks.json", json.dumps(found, indent=1) + "\n")
    write_whole(folder / "teacher_ranks.md", text)
    say(text)


def _row(found: dict[str, Any], pause: float) -> tuple[str, ...]:
    from opd_ds.plan.pipeline import overlapped

    plain = found[f"0-0-{pause:g}"]
    # Of a rank that never waits: its teachers do not sleep. The teacher rank has the rows of all.
    phases = found["1-1-0"]["phases"] | {"score": RANKS * plain["phases"]["score"]}
    visits = STEPS * len(TASKS)
    micro_batches = len(TASKS) * ceil(SAMPLES // (RANKS - 1) * STEPS / MICRO_BATCH)
    cells = []
    for late in (0, 1):
        measured = found[f"1-{late}-{pause:g}"]["seconds"]
        simulated = overlapped(phases, visits, micro_batches, late=bool(late))
        cells += [f"{measured:.2f}", f"{simulated:.2f}", f"{plain['seconds'] / measured:.2f}x"]
    return f"{pause:g}", f"{plain['seconds']:.2f}", f"{plain['phases']['score']:.2f}", *cells


def _config(folder: Path, ranks: int, late: int, pause: float) -> dict[str, Any]:
    return {
        "run": {"rounds": ROUNDS, "output_dir": str(folder / f"{ranks}-{late}-{pause:g}"), "checkpoint_every": ROUNDS},
        "model": {"path": str(folder / "base"), "max_text_length": 10},
        "precision": "fp32",
        "deepspeed": "zero2",
        "rollout": {"samples": SAMPLES, "steps": STEPS, "guidance": 1.0, "micro_batch": SAMPLES * len(TASKS)},
        "train": {"micro_batch": MICRO_BATCH},
        "scoring": {"ranks": ranks, "late": late},
        "tasks": {
            task: {
                "teacher": {"path": str(folder / task), "guidance": 1.0},
                "prompts": str(folder / "prompts.txt"),
            }
            for task in TASKS
        },
        "evaluation": {"baselines": False},
        "trackers": [],
    }


def main(spec_file: str, out: str) -> None:
    """One rank: train the runs of a spec one after the other; rank 0 writes medians of their rounds."""
    world = detect_world()
    prepare_environment(world)
    from opd_ds.config.loading import parse_config
    from opd_ds.engine import init_group
    from opd_ds.runs.train import train
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    spec = json.loads(Path(spec_file).read_text())
    found: dict[str, Any] = {}
    with init_group(world, teacher_ranks=spec["ranks"]) as group:
        for name, run in spec["runs"].items():
            marks: list[tuple[float, dict[str, float]]] = []

            def mark(report: RoundReport, marks: list[tuple[float, dict[str, float]]] = marks) -> None:
                marks.append((time.perf_counter(), report.seconds))

            with _slowed(run["pause"] / 1000):
                train(parse_config(run["config"]), group, callbacks=[mark])
            if world.is_main:
                # Not the last: with `late` it rolls nothing out.
                ends = [end for end, _ in marks[WARM:-1]]
                phases = [seconds for _, seconds in marks[WARM + 1 : -1]]
                found[name] = {
                    "seconds": statistics.median(after - before for before, after in pairwise(ends)),
                    "phases": {key: statistics.median(one[key] for one in phases) for key in phases[0]},
                }
    if world.is_main:
        Path(out).write_text(json.dumps(found) + "\n")


@contextmanager
def _slowed(seconds: float) -> Iterator[None]:
    """Inside, teachers that are loaded sleep for so long a row of each forward."""
    from opd_ds.training.frozen_networks import Resident

    plain = Resident._on_device

    @contextmanager
    def slow(self: Resident) -> Iterator[Callable[..., Any]]:
        def forward(**inputs: Any) -> Any:
            time.sleep(seconds * len(inputs["hidden_states"]))
            return self.module(**inputs)

        yield forward

    setattr(Resident, "_on_device", slow)  # noqa: B010
    try:
        yield
    finally:
        setattr(Resident, "_on_device", plain)  # noqa: B010


if __name__ == "__main__":
    main(*sys.argv[1:])
