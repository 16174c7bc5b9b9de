"""The README's table: the miniature, several seeds, full-parameter and LoRA student, under ZeRO-3 on two processes.

    python benchmarks/miniature_table.py --output-dir runs/table

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
from pathlib import Path
from statistics import mean
from typing import Any

from opd_ds.evaluation.tables import gain_kept

KINDS: dict[str, list[str]] = {
    "full": [],
    "lora": ["student.kind=lora", "optimizer.lr=3e-3"],
}
SAMPLES_PER_PROMPT = 8


def run(kind: str, seed: int, folder: Path, baselines: bool, extra: list[str]) -> dict[str, Any]:
    """One run; returns its summary and seconds."""
    file = folder / "run.json"
    if not file.is_file():
        settings = [
            f"run.seed={seed}",
            f"run.output_dir={folder}",
            f"evaluation.samples_per_prompt={SAMPLES_PER_PROMPT}",
            f"evaluation.baselines={str(baselines).lower()}",
            *KINDS[kind],
            *extra,
        ]
        launcher = str(Path(sys.executable).parent / "deepspeed")
        command = [launcher, "--num_accelerators", "2", "--module", "opd_ds.cli", "train", "--recipe", "miniature"]
        command += ["--resume", "auto", *(part for setting in settings for part in ("--set", setting))]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        summary = json.loads((folder / "summary.json").read_text())
        file.write_text(json.dumps({"seconds": time.perf_counter() - started, "summary": summary}, indent=1))
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--set", dest="extra", action="append", default=[], help="for every run, as in opd-ds train")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    reference: dict[str, Any] | None = None
    rows = []
    for kind in options.kinds:
        for seed in range(options.seeds):
            folder = options.output_dir / f"{kind}-{seed}"
            done = run(kind, seed, folder, reference is None, options.extra)
            tasks = done["summary"]["tasks"]
            reference = reference or tasks
            for task, scores in tasks.items():
                scores |= {name: reference[task][name] for name in ("base", "teacher")}
                rows.append({"kind": kind, "seed": seed, "task": task, **scores, "kept": gain_kept(scores)})
            print({row["task"]: row for row in rows[-len(tasks) :]}, f"{done['seconds']:.0f} s", flush=True)
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
