"""A round whose teachers have ranks of their own (`scoring.ranks`): its seconds where phases run side by side."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil


def overlapped(phases: Mapping[str, float], visits: int, micro_batches: int, *, late: bool = False) -> float:
    """Seconds of a round, once rounds follow one another.

    States are visited at even intervals over the rollout, and a teacher rank is asked at each visit. Training goes
    through the pairs in the order of visits and waits for what is not answered. With `late` a round trains on what was
    answered during the one before, so the slower side alone decides.

    Args:
        phases: seconds of `encode`, `rollout`, `train` and `step` on a rank that trains, and of `score` on a teacher
            rank, each where it waits for nobody.
        visits: how often a teacher rank is asked in a round.
        micro_batches: of training.
    """
    if late:
        return max(sum(seconds for name, seconds in phases.items() if name != "score"), phases["score"])
    answered, done = 0.0, []
    for visit in range(visits):
        asked = phases["encode"] + phases["rollout"] * visit / visits
        answered = max(answered, asked) + phases["score"] / visits
        done.append(answered)
    now = phases["encode"] + phases["rollout"]
    for number in range(1, micro_batches + 1):
        needed = done[ceil(number * visits / micro_batches) - 1]
        now = max(now, needed) + phases["train"] / micro_batches
    return now + phases["step"]
