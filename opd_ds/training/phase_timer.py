"""How long the phases of a round take, on the device's clock where there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


class PhaseTimer:
    """Seconds of one round by phase.

    An accelerator works behind the host, so its time is taken between events on the current stream: no phase waits for
    the device, and what a phase leaves queued is counted as its own. Where the device waits for the host (encoding of
    text, an optimizer on the host, rewards), that lies between the events as well. On a CPU it is the host's time.

    Args:
        new_event: makes a timing event, as `torch.Event` is; None: of `device`, none on a CPU.
    """

    def __init__(self, device: torch.device, new_event: Callable[[], Any] | None = None) -> None:
        if new_event is None and device.type != "cpu":
            new_event = partial(torch.Event, device, enable_timing=True)
        self._new_event = new_event
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is started inside belongs to `name`, which may come again."""
        begin = self._now()
        yield
        self._spans.append((name, begin, self._now()))

    def seconds(self) -> dict[str, float]:
        """By phase; waits until the device is through the last one."""
        if self._new_event is not None and self._spans:
            self._spans[-1][2].synchronize()
        total: dict[str, float] = {}
        for name, begin, end in self._spans:
            lasted = end - begin if self._new_event is None else begin.elapsed_time(end) / 1e3
            total[name] = total.get(name, 0.0) + lasted
        return total

    def _now(self) -> Any:
        if self._new_event is None:
            return time.perf_counter()
        event = self._new_event()
        event.record()
        return event
