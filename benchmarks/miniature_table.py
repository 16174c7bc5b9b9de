"""The README's table: the miniature, several seeds, full-parameter and LoRA student, under ZeRO-3.

    python benchmarks/miniature_table.py --output-dir runs/table [--processes 2] [--parallel 1]

Every run is the shipped recipe with another seed (and `student.kind=lora` with the settings in `KINDS`). Base and
teachers are scored once: their noise is fixed by `evaluation.seed`. Runs that are finished are not repeated. Writes
`table.json` and `table.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from opd_ds.evaluation.tables import gain_kept

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


@dataclass(frozen=True)
class Job:
    """One run: base and teachers are scored only where `baselines` says so."""

    kind: str
    seed: int
    folder: Path
    baselines: bool

    def command(self, processes: int, extra: list[str]) -> list[str]:
        settings = [
            f"run.seed={self.seed}",
            f"run.output_dir={self.folder}",
            f"evaluation.samples_per_prompt={SAMPLES_PER_PROMPT}",
            f"evaluation.baselines={str(self.baselines).lower()}",
            *KINDS[self.kind],
            *extra,
        ]
        arguments = ["--recipe", "miniature", "--resume", "auto", *(p for s in settings for p in ("--set", s))]
        if processes == 1:
            return [sys.executable, "-m", "opd_ds.cli", "train", *arguments]
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(processes)]
        port = str(29500 + list(KINDS).index(self.kind) * 100 + self.seed)
        return [*launcher, "--master_port", port, "--module", "opd_ds.cli", "train", *arguments]


def run(job: Job, processes: int, extra: list[str]) -> dict[str, Any]:
    """The job's summary and seconds; a finished one is not repeated."""
    file = job.folder / "run.json"
    if not file.is_file():
        job.folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with (job.folder / "log.txt").open("w") as log:
            subprocess.run(job.command(processes, extra), check=True, stdout=log, stderr=subprocess.STDOUT)
        summary = json.loads((job.folder / "summary.json").read_text())
        file.write_text(json.dumps({"seconds": time.perf_counter() - started, "summary": summary}, indent=1))
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--processes", type=int, default=2, help="ranks of each run; they change no result")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--set", dest="extra", action="append", default=[], help="for every run, as in opd-ds train")
    options = parser.parse_args()
    every = [(kind, seed) for kind in options.kinds for seed in range(options.seeds)]
    jobs = [Job(kind, seed, options.output_dir / f"{kind}-{seed}", (kind, seed) == every[0]) for kind, seed in every]
    with ThreadPoolExecutor(options.parallel) as pool:
        done = list(pool.map(lambda job: run(job, options.processes, options.extra), jobs))
    reference = done[0]["summary"]["tasks"]
    rows = []
    for job, result in zip(jobs, done, strict=True):
        for task, scores in result["summary"]["tasks"].items():
            scores |= {name: reference[task][name] for name in ("base", "teacher")}
            rows.append({"kind": job.kind, "seed": job.seed, "task": task, **scores, "kept": gain_kept(scores)})
    (options.output_dir / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = as_markdown(rows, options.kinds)
    (options.output_dir / "table.md").write_text(table)
    print(table)


def as_markdown(rows: list[dict[str, Any]], kinds: list[str]) -> str:
    """Tasks by rows; per student kind the mean score over seeds, and the share of the teacher's gain kept by seed."""
    heads = "".join(f" {kind} student | gain kept, by seed |" for kind in kinds)
    lines = [f"| task | base | teacher |{heads}", "|---|---|---|" + "---|---|" * len(kinds)]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        line = f"| {task} | {mine[0]['base']:.3f} | {mine[0]['teacher']:.3f} |"
        for kind in kinds:
            seeds = [row for row in mine if row["kind"] == kind]
            kept = ", ".join("-" if row["kept"] is None else f"{100 * row['kept']:.0f} %" for row in seeds)
            line += f" {mean(row['student'] for row in seeds):.3f} | {kept} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
