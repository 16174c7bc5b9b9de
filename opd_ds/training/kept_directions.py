"""Guidance in rollouts from a direction that was asked for some steps before (guidance caching)."""

from __future__ import annotations

from torch import Tensor

from opd_ds.diffusion.rollout import Rows
from opd_ds.models import GuidedVelocity


class KeptDirections:
    """v_c - v_u of every sample of a rollout, asked for at each `every`-th step and used again in between, as in
    FasterCache (arXiv 2410.19355).

    Args:
        samples: of the rollout.
    """

    def __init__(self, every: int, samples: int) -> None:
        self._every, self._samples = every, samples
        self._values: Tensor | None = None

    def at(self, step: int, rows: Rows) -> Tensor | None:
        """[b, C, ...] of `rows`; None at a step at which it is to be asked for and `put`."""
        if self._values is None or step % self._every == 0:
            return None
        return self._values[rows.device]

    def put(self, rows: Rows, predicted: GuidedVelocity) -> None:
        assert predicted.cond is not None
        assert predicted.uncond is not None
        direction = predicted.cond - predicted.uncond
        if self._values is None:
            self._values = direction.new_empty(self._samples, *direction.shape[1:])
        self._values.index_copy_(0, rows.device, direction)
