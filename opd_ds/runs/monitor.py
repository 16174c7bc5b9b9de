"""What people watch: progress, metrics.jsonl, scores.jsonl, trackers. Only rank 0 shows anything."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml
from rich.console import Console

from opd_ds.cluster.world import World
from opd_ds.config.schema import RunConfig
from opd_ds.evaluation.evaluator import Means
from opd_ds.rewards import Clip, Drawn
from opd_ds.runs.reward_eval import RewardRecord
from opd_ds.runs.trackers import BackgroundTracker, TrackedRun, open_trackers
from opd_ds.training.trainer import RoundReport
from opd_ds.utils.json_lines import json_line
from opd_ds.utils.progress import CONSOLE, work
from opd_ds.utils.secrets import without_secrets

METRICS_FILE = "metrics.jsonl"
REWARDS_FILE = "rewards.jsonl"
SCORES_FILE = "scores.jsonl"


class Monitor:
    """Writes one object a round to metrics.jsonl and the same, with more detail, to the trackers.

    Args:
        start_round: rounds already done; later lines of an earlier attempt are dropped from metrics.jsonl.
        rewards: engine, weights and preprocessing of the run's rewards, by label.
    """

    def __init__(
        self, config: RunConfig, world: World, start_round: int, rewards: dict[str, dict[str, Any]] | None = None
    ) -> None:
        self.console = CONSOLE if world.is_main else Console(quiet=True)
        self._active = world.is_main
        self._rounds = config.run.rounds
        self._last = time.perf_counter()
        self._trackers: list[BackgroundTracker] = []
        if not self._active:
            return
        folder = config.run.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        settings = config.model_dump(mode="json")
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        for name in (METRICS_FILE, REWARDS_FILE, SCORES_FILE):
            _drop_rounds_after(folder / name, start_round)
        self._metrics = (folder / METRICS_FILE).open("a", encoding="utf-8")
        self._rewards, self._scores = folder / REWARDS_FILE, folder / SCORES_FILE
        shown = without_secrets(settings), without_secrets(rewards or {})
        run = TrackedRun(folder.resolve().name, folder, *shown, start_round)
        self._trackers = open_trackers(config.trackers, run)
        self._shown = ExitStack()

    def __enter__(self) -> Monitor:
        self._last = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._active:
            self._shown.close()
            self._metrics.close()
        for tracker in self._trackers:
            tracker.close(failed=error is not None)

    def start_rounds(self, done: int) -> None:
        """The first of them begins; `done` were done before."""
        self._last = time.perf_counter()
        if self._active:
            self._training = self._shown.enter_context(work("training", self._rounds, "rounds", done))

    def tell(self, text: str) -> None:
        """What happens now, in the log."""
        if self._active:
            logging.getLogger("opd_ds").info(text)

    def say(self, text: str) -> None:
        """What a person reads at the end, without the time."""
        self.console.print(text, highlight=False, markup=False)

    def round(self, report: RoundReport) -> None:
        """Record one round."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        if not self._active:
            return
        row = _metrics_row(report, report.samples / elapsed)
        self._metrics.write(json_line(row))
        self._metrics.flush()
        self._track({key: value for key, value in row.items() if key != "round"} | _by_step(report), report.round)
        self._show(report, elapsed)
        if report.skipped_steps:
            logging.getLogger("opd_ds").warning(
                "round %d: a gradient overflowed in fp16, %d optimizer step(s) were skipped and the loss scale is "
                "lowered; where this goes on, set precision = 'bf16'", report.round, report.skipped_steps,
            )  # fmt: skip

    def rewards(self, records: list[RewardRecord]) -> None:
        """Records of the rewards, each with the round whose images were scored, however late it arrives."""
        if not self._active or not records:
            return
        with self._rewards.open("a", encoding="utf-8") as stream:
            for record in records:
                stream.write(json_line(asdict(record)))
                if record.mean is not None:
                    self._track({f"watch/{record.source}/{record.task}/{record.label}": record.mean}, record.round)

    def scores(self, round_index: int, scores: Means) -> None:
        """Held-out rewards of the student by task and label, also as one object a time in scores.jsonl."""
        flat = {f"{task}/{label}": value for task, labels in scores.items() for label, value in labels.items()}
        if not flat:  # images without rewards
            return
        if self._active:
            with self._scores.open("a", encoding="utf-8") as stream:
                stream.write(json_line({"round": round_index} | flat))
            self._track({f"reward/{key}": value for key, value in flat.items()}, round_index)
        shown = ", ".join(f"{key} {value:.3f}" for key, value in flat.items())
        self.tell(f"round {round_index}: held-out rewards of the student: {shown}")

    def cost(self, values: dict[str, float], round_index: int) -> None:
        """What the run cost, at its end, for trackers."""
        self._track(values, round_index)

    def picture(self, tag: str, drawn: Drawn | None, round_index: int) -> None:
        """Show an image or clip, if there is one."""
        for tracker in self._trackers:
            if isinstance(drawn, Clip):
                tracker.clip(tag, drawn, round_index)
            elif drawn is not None:
                tracker.image(tag, drawn, round_index)

    def _track(self, values: dict[str, float], round_index: int) -> None:
        for tracker in self._trackers:
            tracker.scalars(values, round_index)

    def _show(self, report: RoundReport, seconds: float) -> None:
        told = [f"{task} kl {means['kl']:.2e}" for task, means in report.losses.means.items() if "kl" in means]
        told += [f"{key} {value:.3f}" for key, value in report.scores.items() if key.endswith("/mean")]
        self._training.advance(status=f"{seconds:.3g} s/round, loss {report.losses.loss:.3e}  {'  '.join(told)}")
        if report.round == self._rounds:
            self._shown.close()


def _metrics_row(report: RoundReport, rate: float) -> dict[str, Any]:
    row: dict[str, Any] = {"round": report.round, "loss": report.losses.loss, "grad_norm": report.grad_norm}
    row |= {f"task/{task}/{name}": x for task, means in report.losses.means.items() for name, x in means.items()}
    row |= {f"rollout/{key}": value for key, value in report.scores.items()}
    row |= {f"passes/{kind}": count for kind, count in (report.passes | report.passes_by_part).items()}
    if report.skipped_steps is not None:
        row["skipped_steps"] = report.skipped_steps
    row |= {"learning_rate": report.learning_rate, "samples_per_s": rate}
    row |= {f"seconds/{phase}": seconds for phase, seconds in report.seconds.items()}
    # ru_maxrss is in KiB on Linux, in bytes on macOS.
    unit = 2**20 if sys.platform != "darwin" else 2**30
    row["memory/host_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if torch.cuda.is_available():
        row["memory/device_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def _by_step(report: RoundReport) -> dict[str, float]:
    return {
        f"step_{name}/{task}/{step:02d}": value
        for task, measures in report.losses.by_step.items()
        for name, values in measures.items()
        for step, value in enumerate(values.tolist())
        if value == value  # a step that was not trained is NaN
    }


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl, none if there is no such file; a last line cut off by a kill is left out."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _drop_rounds_after(file: Path, last_round: int) -> None:
    if file.is_file():
        kept = [row for row in read_metrics(file) if row["round"] <= last_round]
        draft = file.with_suffix(".tmp")
        draft.write_text("".join(map(json_line, kept)), encoding="utf-8")
        draft.replace(file)
