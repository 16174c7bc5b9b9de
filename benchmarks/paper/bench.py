"""The bench from start to end: jobs, then tables, claims, plots and a page about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.paper.claims import summary
from benchmarks.paper.jobs import run_jobs
from benchmarks.paper.plan import EVALUATION_STEPS, GRADIENTS, Plan, jobs
from benchmarks.paper.plots import draw_all
from benchmarks.paper.real import real_rewards
from benchmarks.paper.records import keep, restore
from benchmarks.paper.report import as_markdown
from benchmarks.paper.table import Findings, collect, rows
from benchmarks.plots import require_plots, write_csv


def bench(plan: Plan, folder: Path, parallel: int, say: Callable[[str], None], records: Path | None = None) -> None:
    """Run what is missing in `folder`, then write everything.

    Args:
        records: what jobs found on other days or machines, and where it is kept what these find, also when this ends
            early.

    Raises:
        UserError: a job failed, `folder` holds another plan's, or matplotlib is not installed.
    """
    require_plots()
    folder.mkdir(parents=True, exist_ok=True)
    planned = jobs(plan)
    if records is not None and (known := restore(planned, folder, records)):
        say(f"{len(known)} jobs are in {records}")
    minutes = sum(job.seconds for job in planned) / 60 / parallel
    say(f"{len(planned)} jobs, {parallel} at a time: about {minutes:.0f} minutes if nothing is finished yet")
    try:
        run_jobs(planned, folder, parallel, say)
    finally:
        if records is not None:
            keep(planned, folder, records)
    real = real_rewards()
    if real is None:
        say("scikit-learn is not installed: no scores of real images (pip install 'opd-ds[miniature]')")
    gradients = json.loads((folder / GRADIENTS / f"{GRADIENTS}.json").read_text(encoding="utf-8"))
    write(collect(plan, folder, real, gradients), plan, folder)
    say((folder / "README.md").read_text(encoding="utf-8").partition("## Images")[0])
    say(f"report: {folder / 'README.md'}")


def write(findings: Findings, plan: Plan, folder: Path) -> None:
    """table.csv, summary.json, plots with their CSVs, README.md."""
    said = ("seeds", "share", "samples_per_prompt", "gradient_rollouts", "gradient_transitions")
    settings = {key: getattr(plan, key) for key in said} | {"evaluation_steps": EVALUATION_STEPS}
    # Through JSON, so that the page is made of what the file says.
    text = json.dumps(summary(findings, settings), indent=1)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    found = json.loads(text)
    write_csv(folder / "table.csv", rows(findings.outcomes))
    images = draw_all(findings, found["methods"], folder)
    (folder / "README.md").write_text(as_markdown(found, images), encoding="utf-8")
