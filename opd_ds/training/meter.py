"""What a round takes, and the heartbeat that says it is going on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from opd_ds.engine import Group
from opd_ds.training.phase_timer import PhaseTimer

# So begin the names of the phases in a profiler's trace.
PHASE_RANGE = "round/"


class RoundMeter:
    """Seconds by phase and passes of the network over one latent, of this rank in one round.

    Args:
        round_number: counted from 1, as people see it.
    """

    def __init__(self, group: Group, round_number: int) -> None:
        self._group, self.round_number = group, round_number
        self._phase = ""
        self._timer = PhaseTimer(group.device)
        self._forward = self._backward = 0

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

    def count(self, passes: int, *, backward: bool) -> None:
        """Passes forward; with `backward` they are passed back as well."""
        self._forward += passes
        self._backward += passes if backward else 0

    def passes(self) -> dict[str, int]:
        """`forward` and `backward` of all ranks together, samples that pad a rank's part too. Collective."""
        counts = torch.tensor([self._forward, self._backward])
        total = self._group.sum(counts) if self._group.world.size > 1 else counts
        return dict(zip(("forward", "backward"), total.long().tolist(), strict=True))
