"""The bench from start to end: jobs, then tables, claims, plots and a page about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from benchmarks.paper.claims import summary
from benchmarks.paper.jobs import DONE_FILE, run_jobs
from benchmarks.paper.plan import EVALUATION_STEPS, GRADIENTS, Plan, jobs, runs
from benchmarks.paper.plots import draw_all
from benchmarks.paper.real import real_rewards
from benchmarks.paper.report import as_markdown
from benchmarks.paper.table import Findings, collect, rows
from benchmarks.plots import require_plots, write_csv
from opd_ds.config.loading import parse_config
from opd_ds.errors import UserError


def bench(plan: Plan, folder: Path, parallel: int, say: Callable[[str], None]) -> None:
    """Run what is missing in `folder`, then write everything.

    Raises:
        UserError: a job failed, `folder` holds another plan's, or matplotlib is not installed.
    """
    require_plots()
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_settings(plan, folder)
    planned = jobs(plan)
    minutes = sum(job.seconds for job in planned) / 60 / parallel
    say(f"{len(planned)} jobs, {parallel} at a time: about {minutes:.0f} minutes if nothing is finished yet")
    run_jobs(planned, folder, parallel, say)
    real = real_rewards()
    if real is None:
        say("scikit-learn is not installed: no scores of real images (pip install 'opd-ds[miniature]')")
    gradients = json.loads((folder / GRADIENTS / f"{GRADIENTS}.json").read_text(encoding="utf-8"))
    write(collect(plan, folder, real, gradients), plan, folder)
    say((folder / "README.md").read_text(encoding="utf-8").partition("## Images")[0])
    say(f"report: {folder / 'README.md'}")


def refuse_other_settings(plan: Plan, folder: Path) -> None:
    """A job is known by its command, which names a recipe; what the recipe said then must be what it says now.

    Raises:
        UserError: naming the first finished run with other settings.
    """
    for run in runs(plan):
        place = folder / run.name
        if not (place / DONE_FILE).is_file():
            continue
        if parse_config(yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))) != run.config:
            raise UserError(
                f"--output-dir {folder}: run {run.name} was finished with other settings than the plan and the recipe "
                f"{run.recipe} have now; give another folder, or remove this one"
            )


def write(findings: Findings, plan: Plan, folder: Path) -> None:
    """table.csv, summary.json, plots with their CSVs, README.md."""
    said = ("seeds", "share", "samples_per_prompt", "gradient_rollouts", "gradient_transitions")
    settings = {key: getattr(plan, key) for key in said} | {"evaluation_steps": EVALUATION_STEPS}
    # Through JSON, so that the page is made of what the file says.
    text = json.dumps(summary(findings, settings), indent=1)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    found = json.loads(text)
    write_csv(folder / "table.csv", rows(findings.outcomes))
    draw_all(findings, found["methods"], folder)
    (folder / "README.md").write_text(as_markdown(found), encoding="utf-8")
