"""Passes of the network over one latent: what a run costs, known before it starts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd_ds.config.schema import RunConfig
from opd_ds.models import family_class
from opd_ds.training.steps import last_steps


@dataclass(frozen=True)
class Passes:
    """`negative`: those forward that are made with the negative prompt, which is what guidance costs."""

    forward: int = 0
    backward: int = 0
    negative: int = field(default=0, compare=False)

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward, self.negative + other.negative)

    def times(self, count: int) -> Passes:
        return Passes(self.forward * count, self.backward * count, self.negative * count)

    @property
    def total(self) -> int:
        return self.forward + self.backward

    @property
    def units(self) -> int:
        """Pass units, in which budgets are compared: a backward pass does about the work of two forward passes."""
        return self.forward + 2 * self.backward


def planned_passes(config: RunConfig) -> Passes:
    """Of all rounds of a run on one rank, by its settings; evaluation is not counted, as in metrics.jsonl. Where random
    steps end the rollouts it is an expectation.
    """
    rounds = Counter(
        (task, config.shows_rollouts(index)) for index in range(config.run.rounds) for task in config.tasks_of(index)
    )
    total = Passes()
    for (task, shown), count in rounds.items():
        total += sum(round_passes(config, task, shown=shown).values(), Passes()).times(count)
    return total


def round_passes(config: RunConfig, task: str, *, shown: bool | None = None) -> dict[str, Passes]:
    """One round of a task, by phase as `RoundReport.seconds` names them: `rollout`, `score` (what frozen networks are
    asked at the trained states) and `train`. A fused round has one phase; its parts are told apart here all the same.

    Args:
        shown: whether somebody looks at its images, which are finished then; default: as in the first round.
    """
    rollout, student = config.rollout, student_passes(config, task)
    taken = steps_taken(config, shown=config.shows_rollouts(0) if shown is None else shown)
    samples = config.samples(task)
    pairs = samples * config.trained_steps
    per_velocity, rolled = family_class(config.model.family).passes, round(samples * _mean(taken))
    directed = round(samples * _mean(torch.ceil(taken / rollout.negative_every)))
    guidances = config.queried_guidances(task)
    asked = sum(map(per_velocity, guidances))
    if rollout.mode == "fused":  # a trained step's forward is the rollout's; random queries take all steps
        pairs = rolled if rollout.trained_steps.queries else pairs
        rolled -= pairs
        directed = rolled
    directed *= per_velocity(config.rollout_guidance(task)) - 1
    trained = student * pairs * config.train.inner_epochs
    return {
        "rollout": Passes(rolled + directed, negative=directed),
        "score": Passes(asked * pairs, negative=(asked - len(guidances)) * pairs),
        "train": Passes(trained, trained, trained * (student - 1) // student),
    }


def steps_taken(config: RunConfig, *, shown: bool) -> Tensor:
    """Steps that trajectories take, int64: all of them where somebody looks at the images, else up to the last trained
    state (drawn ones, of which the mean is an expectation, where steps are random; on several ranks some samples go a
    little further, see `in_step`).
    """
    rollout = config.rollout
    if shown or (rollout.mode == "fused" and rollout.trained_steps.queries):
        return torch.tensor([rollout.steps])
    return config.steps_until_trained(0) + last_steps(rollout.trained_steps, rollout.steps)


def _mean(counts: Tensor) -> float:
    return float(counts.double().mean())


def student_passes(config: RunConfig, task: str) -> int:
    """Passes of one guided velocity of the student."""
    return family_class(config.model.family).passes(config.student_guidance(task))


def passes_at_once(config: RunConfig, passes: int) -> int:
    """How many of the `passes` of one guided velocity are one call of the network."""
    return 1 if family_class(config.model.family).guides_in_two_calls else passes
