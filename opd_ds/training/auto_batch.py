"""The largest batch that fits: found by running out of memory once, not by rules."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from opd_ds.config.schema import RunConfig
from opd_ds.engine import empty_cache


class AutoMicroBatch:
    """Rows per forward of work without collectives.

    Args:
        what: for the log.
        size: rows to start with; None: all of them.
        shrinks: whether to halve when memory runs out, and stay there. On CPUs that cannot be caught.
    """

    def __init__(self, what: str, size: int | None, *, shrinks: bool) -> None:
        self._what, self.size, self._shrinks = what, size, shrinks

    @classmethod
    def scoring(cls, config: RunConfig, device: torch.device) -> AutoMicroBatch:
        """Of the frozen networks of a run."""
        found = config.scoring.micro_batch == "auto" and device.type != "cpu"
        return cls("scoring.micro_batch = auto", None if found else config.scoring_micro_batch, shrinks=found)

    def run(self, total: int, compute: Callable[[slice], Tensor]) -> list[Tensor]:
        """`compute` over all of `total` rows, in order.

        Raises:
            torch.OutOfMemoryError: a single row does not fit, or it does not shrink.
        """
        results: list[Tensor] = []
        start = 0
        while start < total:
            size = min(self.size or total, total - start)
            try:
                results.append(compute(slice(start, start + size)))
            except torch.OutOfMemoryError:
                if not self._shrinks or size == 1:
                    raise
            else:
                start += size
                continue
            # Outside of the handler: inside, the exception keeps the frames and their tensors alive.
            self.size = size // 2
            logging.getLogger("opd_ds").info("%s: %d at once do not fit, going on with %d", self._what, size, self.size)
            empty_cache()
        return results
