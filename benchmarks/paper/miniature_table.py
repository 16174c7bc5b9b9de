"""The shipped recipe `miniature` with several seeds, full-parameter and LoRA student, under ZeRO-3: is the gain kept?

Every run is the recipe with another seed and the settings in `KINDS`. Base and teachers are scored once: their noise is
fixed by `evaluation.seed`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.paper.jobs import Job, run_jobs
from opd_ds.errors import UserError
from opd_ds.evaluation.tables import gain_kept
from opd_ds.utils.markdown import markdown_table

KINDS: dict[str, list[str]] = {
    "full": [],
    "lora": [
        "student.kind=lora",
        "student.lora.targets=[attn.to_q, attn.to_k, attn.to_v, attn.to_out.0, attn.add_q_proj, attn.add_k_proj, "
        "attn.add_v_proj, attn.to_add_out, ff.net.0.proj, ff.net.2, norm1.linear]",
        "optimizer.lr=4e-3",
        "run.rounds=700",
    ],
}
SAMPLES_PER_PROMPT = 8
_PORT = 29500


def bench(
    folder: Path,
    kinds: Sequence[str],
    seeds: int,
    processes: int,
    parallel: int,
    extra: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Run what is missing in `folder`, then write table.json and table.md there.

    Args:
        kinds: of students; all where it is empty.
        processes: ranks of each run.
        extra: settings of every run, as `opd-ds train --set` takes them.

    Raises:
        UserError: an unknown kind; a run failed, naming its log.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(f"--kind {unknown[0]}: allowed are {', '.join(KINDS)}")
    folder.mkdir(parents=True, exist_ok=True)
    planned = {(kind, seed): f"{kind}-{seed}" for kind in kinds or KINDS for seed in range(seeds)}
    jobs = [
        _job(name, number, processes, ["evaluation.baselines=" + str(number == 0).lower(), *_settings(*which), *extra])
        for number, (which, name) in enumerate(planned.items())
    ]
    run_jobs(jobs, folder, parallel, say)
    found = {which: json.loads((folder / name / "summary.json").read_text()) for which, name in planned.items()}
    reference = next(iter(found.values()))["tasks"]
    rows = []
    for (kind, seed), summary in found.items():
        for task, scores in summary["tasks"].items():
            scores |= {name: reference[task][name] for name in ("base", "teacher")}
            rows.append({"kind": kind, "seed": seed, "task": task, **scores, "kept": gain_kept(scores)})
    (folder / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "table.md").write_text(as_markdown(rows))
    say(as_markdown(rows))


def _settings(kind: str, seed: int) -> list[str]:
    return [
        f"run.seed={seed}",
        f"run.output_dir=./{kind}-{seed}",
        f"evaluation.samples_per_prompt={SAMPLES_PER_PROMPT}",
        *KINDS[kind],
    ]


def _job(name: str, number: int, processes: int, settings: Sequence[str]) -> Job:
    sets = [part for setting in settings for part in ("--set", setting)]
    train = ["train", "--recipe", "miniature", "--resume", "auto", *sets]
    if processes == 1:
        return Job(name, tuple(train))
    launcher = ["--num_accelerators", str(processes), "--master_port", str(_PORT + number)]
    return Job(name, (*launcher, "--module", "opd_ds.cli", *train), module="deepspeed.launcher.runner")


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Tasks by rows; per student kind the mean score over seeds, and the share of the teacher's gain kept by seed."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    head = ["task", "base", "teacher", *(t for k in kinds for t in (f"{k} student", "gain kept, by seed"))]
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        cells = [task, f"{mine[0]['base']:.3f}", f"{mine[0]['teacher']:.3f}"]
        for kind in kinds:
            seeds = [row for row in mine if row["kind"] == kind]
            kept = ", ".join("-" if row["kept"] is None else f"{100 * row['kept']:.0f} %" for row in seeds)
            cells += [f"{mean(row['student'] for row in seeds):.3f}", kept]
        lines.append(cells)
    return markdown_table(head, lines)
