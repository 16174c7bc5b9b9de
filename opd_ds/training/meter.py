"""What a round takes, and the heartbeat that says it is going on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch.profiler import record_function

from opd_ds.engine import Group
from opd_ds.training.phase_timer import PhaseTimer

# So begin the names of the phases in a profiler's trace.
PHASE_RANGE = "round/"
# What passes are made for: drawing; what frozen networks say of trained states; the student's training.
Part = Literal["rollout", "score", "train"]
PARTS: tuple[Part, ...] = ("rollout", "score", "train")


class RoundMeter:
    """Seconds by phase and passes of the network over one latent, of this rank in one round.

    Args:
        round_number: counted from 1, as people see it.
    """

    def __init__(self, group: Group, round_number: int) -> None:
        self._group, self.round_number = group, round_number
        self._phase = ""
        self._timer = PhaseTimer(group.device)
        self._passes: Counter[str] = Counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Work of one kind; a phase that is entered again goes on."""
        self._phase = name
        self.heartbeat()
        with self._timer.phase(name), record_function(PHASE_RANGE + name):
            yield

    def seconds(self) -> dict[str, float]:
        """By phase; waits until the device is through."""
        return self._timer.seconds()

    def heartbeat(self, waiting: str = "") -> None:
        """This rank makes progress; `waiting` says on what, should it not make any more."""
        self._group.progress(f"round {self.round_number}, {self._phase}{waiting}")

    def part(self, part: Part) -> PassCounter:
        """What counts the passes of one part."""
        return PassCounter(self, part)

    def count(self, part: Part, rows: int, negatives: int, *, backward: bool) -> None:
        """Passes forward of `rows` latents, and of `negatives` more with the negative prompt; with `backward` they are
        passed back as well.
        """
        self._passes["forward"] += rows + negatives
        self._passes["backward"] += rows + negatives if backward else 0
        self._passes[part] += rows + negatives
        self._passes[f"{part}_negative"] += negatives

    def passes(self) -> tuple[dict[str, int], dict[str, int]]:
        """`forward` and `backward` of all ranks together, samples that pad a rank's part too; and of those forward each
        part's, with `<part>_negative` of them with the negative prompt. Collective.
        """
        totals = ("forward", "backward")
        parts = [name for part in PARTS for name in (part, f"{part}_negative")]
        counts = torch.tensor([self._passes[name] for name in (*totals, *parts)])
        counts = self._group.sum_over_samples(counts) if self._group.world.size > 1 else counts
        found = dict(zip((*totals, *parts), counts.long().tolist(), strict=True))
        return {name: found[name] for name in totals}, {name: found[name] for name in parts}


@dataclass(frozen=True)
class PassCounter:
    """Counts the passes of one part of a round, each a sign that the round is going on."""

    meter: RoundMeter
    part: Part

    def heartbeat(self) -> None:
        self.meter.heartbeat()

    def count(self, rows: int, negatives: int, *, backward: bool = False) -> None:
        self.meter.count(self.part, rows, negatives, backward=backward)
