"""The miniature that edits, from nothing: its base, a teacher for edits and one for composition, one student of both.

Every job is a command that a user can give: `opd-ds miniature build-editing`, `teach`, `merge`, `train` and `eval`,
with the shipped recipes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.paper.jobs import DONE_FILE, Job, run_jobs
from opd_ds.checkpoint.export_student import EXPORT_FOLDER
from opd_ds.evaluation.results import RESULTS_FILE
from opd_ds.evaluation.tables import comparison_grid
from opd_ds.rewards import Drawn
from opd_ds.utils.markdown import markdown_table

TASKS = ("edit", "composition")
MODELS = {
    "base": "base",
    "teacher:edit": "teacher for edits",
    "teacher:composition": "teacher for composition",
    "merged": "the teachers' weights merged",
    "student": "**student**",
}
GRID_FILE, PAGE_FILE, SHOWN = "grid.png", "README.md", 6
_WORLD, _STUDENT, _SCORES = "world", "student", "scores"


def bench(folder: Path, parallel: int, extra: Sequence[str], say: Callable[[str], None]) -> None:
    """Run what is missing in `folder`, then write README.md and grid.png there.

    Args:
        extra: settings of every teach, train and eval, as they take them with `--set`.

    Raises:
        UserError: a job failed, naming its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    planned = jobs(extra)
    run_jobs(planned, folder, parallel, say)
    scores = folder / _SCORES / "eval"
    results = json.loads((scores / RESULTS_FILE).read_text(encoding="utf-8"))
    grid = grid_of(results, scores / "images", folder / _WORLD / "prompts")
    grid.save(folder / GRID_FILE)
    seconds = {job.name: json.loads((folder / job.name / DONE_FILE).read_text())["seconds"] for job in planned}
    page = as_markdown(results, seconds)
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
    say(page)


def jobs(extra: Sequence[str] = ()) -> list[Job]:
    """Paths begin with a dot: what is missing is then never taken for a name on the model hub."""
    teachers = {task: f"teacher-{task}" for task in TASKS}
    exports = {task: f"./{name}/{EXPORT_FOLDER}" for task, name in teachers.items()}
    base = f"./{_WORLD}/base"
    merge = ("merge", "./merged/model", *exports.values(), "--base", base, "--family", "flux_kontext")
    learned = [f"tasks.{task}.teacher.path={export}" for task, export in exports.items()]
    student = _sets(_STUDENT, [*learned, *extra])
    recipe = ("--recipe", "miniature_editing")
    return [
        Job(_WORLD, ("miniature", "build-editing", "--output-dir", f"./{_WORLD}")),
        *(_teach(task, name, extra) for task, name in teachers.items()),
        Job("merged", merge, tuple(teachers.values())),
        Job(_STUDENT, ("train", *recipe, "--resume", "auto", *student), tuple(teachers.values())),
        Job(
            _SCORES,
            ("eval", *recipe, *student, "--model", "merged=./merged/model", "--output", f"./{_SCORES}/eval"),
            ("merged", _STUDENT),
        ),
    ]


def _teach(task: str, name: str, extra: Sequence[str]) -> Job:
    sets = _sets(name, extra, edits="tasks" if task == "edit" else "probes")
    return Job(name, ("teach", "--recipe", f"miniature_editing_nft_{task}", "--resume", "auto", *sets), (_WORLD,))


def _sets(name: str, more: Sequence[str], edits: str = "tasks") -> list[str]:
    """The recipe's paths in the bench's folder; `edits` are among its tasks or its probes."""
    prompts = f"./{_WORLD}/prompts/edit"
    # Base and teachers are drawn once, at the end.
    values = [f"run.output_dir=./{name}", f"model.path=./{_WORLD}/base", "evaluation.baselines=false"]
    values += [f"{edits}.edit.eval_prompts.path={prompts}/test.jsonl"]
    values += [f"tasks.edit.prompts.path={prompts}/train.jsonl"] * (edits == "tasks")
    return [part for value in (*values, *more) for part in ("--set", value)]


def as_markdown(results: dict[str, Any], seconds: dict[str, float]) -> str:
    """Mean reward on held-out prompts with half the 95 % interval, models by tasks; minutes of every job."""
    rows = [[called, *(_cell(results["scores"][model][task][f"miniature_{task}"]) for task in TASKS)]
            for model, called in MODELS.items()]  # fmt: skip
    chosen = [f"{len(results['sets'][task]['prompts'])} for {task}" for task in TASKS]
    drawn = f"{results['sets'][TASKS[0]]['samples']} images of each"
    minutes = [[name, f"{taken / 60:.1f}"] for name, taken in seconds.items()]
    return (
        "# The miniature that edits\n\n"
        f"Mean reward on held-out prompts ({', '.join(chosen)}; {drawn}), ± half the 95 % interval:\n\n"
        f"{markdown_table(['', *TASKS], rows)}\n"
        f"![Reference pictures, and what each model draws]({GRID_FILE})\n\n"
        f"{markdown_table(['job', 'minutes'], minutes)}"
    )


def _cell(entry: dict[str, Any]) -> str:
    low, high = entry["ci95"]
    return f"{entry['mean']:.3f}" + (f" ± {(high - low) / 2:.3f}" if low is not None else "")


def grid_of(results: dict[str, Any], images: Path, prompts: Path) -> Image.Image:
    """The first images of each model on each task, below the pictures that are edited."""

    def opened(files: Sequence[Path]) -> list[Image.Image]:
        return [Image.open(file).convert("RGB") for file in files]

    edits = [json.loads(line) for line in (prompts / "edit" / "test.jsonl").read_text().splitlines()[:SHOWN]]
    references = {"edit": opened([prompts / "edit" / row["picture"] for row in edits]), "composition": []}
    drawn: dict[str, dict[str, list[Drawn]]] = {
        model: {
            task: [
                *opened([images / results["models"][model]["folder"] / task / f"{k:05d}-0.png" for k in range(SHOWN)])
            ]
            for task in TASKS
        }
        for model in MODELS
    }
    asked = {task: results["sets"][task]["prompts"] for task in TASKS}
    grid = comparison_grid(drawn, asked, references)
    assert isinstance(grid, Image.Image)
    return grid
