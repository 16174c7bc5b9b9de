"""`python -m benchmarks passes`: held-out reward against passes of the network, in the miniature with guided teachers.

The public loop's way (the paper's: every step rolled out, replayed by the teacher and trained but the last, guidance of
2 in student and teachers, the sum of all tasks in a round), its way with what saves passes here, and the recipe, whose
student absorbs the guidance. Every other setting is the recipe's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from benchmarks.paper.jobs import run_jobs
from benchmarks.paper.methods import TOGETHER, guided
from benchmarks.paper.plan import EVALUATION_STEPS, Run
from benchmarks.paper.table import curve, mean_of_tasks
from benchmarks.plots import panels, require_plots, write_csv, write_png
from opd_ds.config.schema import RunConfig
from opd_ds.utils.markdown import markdown_table

_EVALUATIONS = 8


@dataclass(frozen=True)
class Way:
    """A way to distil; `public`: its passes are counted as the public loop makes them."""

    name: str
    rounds: int
    settings: tuple[str, ...]
    public: bool = False


# The recipe's rounds with a guided student, and as many as take the same passes.
WAYS = (
    Way("public loop", 215, (*TOGETHER, "rollout.trained_steps={fraction: 0.9}", *guided(2.0)), public=True),
    Way("recipe, student guided, too", 510, guided(2.0)),
    Way("recipe, guidance absorbed", 886, guided(1.0)),
)


@dataclass(frozen=True)
class Measured:
    """Mean held-out rewards of the tasks after so many pass units."""

    name: str
    per_trajectory: float
    units: list[float]
    rewards: list[float]

    def until(self, reward: float) -> float | None:
        """Units at which a line through the measured points first reaches `reward`."""
        points = list(zip(self.units, self.rewards, strict=True))
        for (start, low), (end, high) in pairwise(points):
            if low < reward <= high:
                return start + (end - start) * (reward - low) / (high - low)
        return None


def bench(folder: Path, seed: int, share: float, parallel: int, say: Callable[[str], None]) -> None:
    """Run what is missing in `folder`, then write passes.json, passes.md and passes.png there.

    Args:
        share: of each way's rounds.
    """
    require_plots()
    folder.mkdir(parents=True, exist_ok=True)
    ways = [replace(way, rounds=max(_EVALUATIONS, round(way.rounds * share))) for way in WAYS]
    runs = [_run(number, way, seed) for number, way in enumerate(ways)]
    run_jobs([run.job() for run in runs], folder, parallel, say)
    found = [_measured(way, run, folder) for way, run in zip(ways, runs, strict=True)]
    (folder / "passes.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    (folder / "passes.md").write_text(as_markdown(found), encoding="utf-8")
    _draw(found, folder / "passes")
    say(as_markdown(found))


def as_markdown(found: Sequence[Measured]) -> str:
    """One row a way; the reward that passes are compared at is the least of the best ones."""
    common = min(max(one.rewards) for one in found)
    head = [
        "way", "pass units a trajectory", "pass units", "mean reward first", "at the end",
        f"pass units until {common:.3f}", "of the public loop's",
    ]  # fmt: skip
    first = found[0].until(common)
    rows = [
        [
            one.name,
            f"{one.per_trajectory:.1f}",
            f"{one.units[-1]:,.0f}",
            f"{one.rewards[0]:.3f}",
            f"{one.rewards[-1]:.3f}",
            "-" if (until := one.until(common)) is None else f"{until:,.0f}",
            "-" if until is None or first is None else f"{until / first:.2f}",
        ]
        for one in found
    ]
    return markdown_table(head, rows)


def public_passes(config: RunConfig) -> int:
    """Pass units that the public loop takes for a trajectory, student and teacher guided: it finishes the rollout and
    replays all of it by the teacher.
    """
    return 2 * (2 * config.rollout.steps + 3 * config.trained_steps)


def _run(number: int, way: Way, seed: int) -> Run:
    settings = (
        f"run.seed={seed}",
        f"run.eval_every={way.rounds // _EVALUATIONS}",
        "run.image_every=0",
        "run.keep_checkpoints=1",
        f"optimizer.warmup_rounds={max(1, way.rounds // 25)}",
        "deepspeed=ds_configs/zero0.json",  # on one rank there is nothing to shard, and hooks cost time
        f"evaluation.steps={EVALUATION_STEPS}",
        "evaluation.samples_per_prompt=1",
        "evaluation.baselines=false",
        *way.settings,
    )
    return Run(f"{number}", "train", "miniature", way.rounds, settings)


def _measured(way: Way, run: Run, folder: Path) -> Measured:
    summary = json.loads((folder / run.name / "summary.json").read_text(encoding="utf-8"))
    points = curve(folder, [run.name])
    per_trajectory = public_passes(run.config) if way.public else summary["passes"]["per_trajectory"]
    factor = per_trajectory / summary["passes"]["per_trajectory"]
    return Measured(
        way.name,
        per_trajectory,
        [factor * point.passes.units for point in points],
        [mean_of_tasks(point.rewards) for point in points],
    )


def _draw(found: Sequence[Measured], place: Path) -> None:
    lines = [
        {"way": one.name, "units": round(units), "reward": round(reward, 4)}
        for one in found
        for units, reward in zip(one.units, one.rewards, strict=True)
    ]
    write_csv(place.with_suffix(".csv"), lines)
    figure, (axes,) = panels(1)
    axes.set(xlabel="thousand pass units (forward + 2 x backward)", ylabel="mean held-out reward of the tasks")
    for one in found:
        axes.plot([units / 1e3 for units in one.units], one.rewards, ".-", label=one.name)
    figure.set_size_inches(7, 4.6)
    write_png(figure, place.with_suffix(".png"))
