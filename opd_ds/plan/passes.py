"""Passes of the network over one latent: what a run costs, known before it starts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from opd_ds.config.schema import RunConfig
from opd_ds.models import family_class
from opd_ds.training.steps import mean_last_step


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
    taken = rolled_steps(config, shown=config.shows_rollouts(0) if shown is None else shown)
    samples = config.samples(task)
    pairs = samples * config.trained_steps
    per_velocity, rolled = family_class(config.model.family).passes, round(samples * taken)
    drawn = per_velocity(config.rollout_guidance(task))
    asked = sum(map(per_velocity, config.queried_guidances(task)))
    if rollout.mode == "fused":  # a trained step's forward is the rollout's; random queries take all steps
        pairs = rolled if rollout.trained_steps.queries else pairs
        rolled -= pairs
    trained = student * pairs * config.train.inner_epochs
    return {"rollout": Passes(drawn * rolled), "score": Passes(asked * pairs), "train": Passes(trained, trained)}


def rolled_steps(config: RunConfig, *, shown: bool) -> float:
    """Steps that a trajectory takes: all of them where somebody looks at the images, else up to its last trained state
    (an expectation where steps are random; on several ranks some samples go a little further, see `in_step`).
    """
    rollout = config.rollout
    if shown or (rollout.mode == "fused" and rollout.trained_steps.queries):
        return rollout.steps
    return config.steps_until_trained(0) + mean_last_step(config.rollout.trained_steps, config.rollout.steps)


def student_passes(config: RunConfig, task: str) -> int:
    """Passes of one guided velocity of the student."""
    return family_class(config.model.family).passes(config.student_guidance(task))


def passes_at_once(config: RunConfig, passes: int) -> int:
    """How many of the `passes` of one guided velocity are one call of the network."""
    return 1 if family_class(config.model.family).guides_in_two_calls else passes
