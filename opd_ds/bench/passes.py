"""Passes of the network over one latent: what a run costs, known before it starts and read off after it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from opd_ds.config import DistilConfig, RunConfig
from opd_ds.models import family_class
from opd_ds.monitor import METRICS_FILE, read_metrics
from opd_ds.teach.config import NftSection, TeachConfig


@dataclass(frozen=True)
class Passes:
    forward: int = 0
    backward: int = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: int) -> Passes:
        return Passes(self.forward * count, self.backward * count)

    @property
    def total(self) -> int:
        return self.forward + self.backward

    @property
    def units(self) -> int:
        """Pass units, in which budgets are compared: a backward pass does about the work of two forward passes."""
        return self.forward + 2 * self.backward


def planned_passes(config: RunConfig) -> Passes:
    """Of all rounds of a run on one rank, by its settings; evaluation is not counted, as in metrics.jsonl.

    Raises:
        ValueError: a fused or off-policy distillation, whose rounds are made otherwise.
    """
    if isinstance(config, DistilConfig) and (config.rollout.mode == "fused" or config.objective.method == "sft"):
        raise ValueError("the passes of rollout.mode = 'fused' and of objective.method = 'sft' are not known here")
    total = Passes()
    for task, rounds in _rounds_by_task(config).items():
        total += _passes_of_a_round(config, task).times(rounds)
    return total


def measured_passes(folder: Path) -> Passes:
    """Of all rounds in the run's metrics.jsonl."""
    total = Passes()
    for row in read_metrics(folder / METRICS_FILE):
        total += Passes(row["passes/forward"], row["passes/backward"])
    return total


def _rounds_by_task(config: RunConfig) -> dict[str, int]:
    rounds = config.run.rounds
    if not isinstance(config, TeachConfig) or config.teach.schedule == "together":
        return dict.fromkeys(config.tasks, rounds)
    turns = [name for name, task in config.tasks.items() for _ in range(task.turns)]
    return dict(Counter(turns[index % len(turns)] for index in range(rounds)))


def _passes_of_a_round(config: RunConfig, task: str) -> Passes:
    """Rollout, what frozen networks are asked at the trained states, and training there."""
    rollout, per_velocity = config.rollout, family_class(config.model.family).passes
    own = config.tasks[task].guidance
    student = per_velocity(rollout.guidance if own is None else own)
    pairs = rollout.samples * config.trained_steps
    asked = 0
    if isinstance(config, TeachConfig):
        asked += student if isinstance(config.teach, NftSection) else 0  # the old policy
        asked += student if config.teach.kl else 0  # the start
    elif isinstance(config, DistilConfig):
        asked += per_velocity(config.tasks[task].teacher.guidance)
        asked += per_velocity(config.anchor.guidance) if config.anchor else 0
    trained = student * pairs * config.train.inner_epochs
    return Passes(student * rollout.samples * rollout.steps + asked * pairs + trained, trained)
