"""Images that a reward could not score: NaN, counted by kind, and said in one line per call."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from math import isfinite
from threading import Lock

import torch
from torch import Tensor

# What became of one image: its score, or in a few words why there is none.
Result = float | str


UNREADABLE = "unreadable or without a finite score"


def scored_where(reasons: Sequence[str | None], score: Callable[[list[int]], Tensor]) -> list[Result]:
    """The scores of the images that have no reason against one; `score` is asked for those at some places, [b]."""
    asked = [place for place, reason in enumerate(reasons) if reason is None]
    found: list[Result] = [reason or UNREADABLE for reason in reasons]
    for place, value in zip(asked, score(asked).tolist() if asked else [], strict=True):
        if isfinite(value):
            found[place] = value
    return found


class Gaps:
    """The failures of one reward since it was built.

    Attributes:
        failures: number of images by kind of failure.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = Lock()  # monitors score from worker threads
        self.failures: Counter[str] = Counter()

    def close(self, results: Sequence[Result]) -> Tensor:
        """float32 scores [B], NaN where the result is a failure; failures are counted and logged."""
        found = Counter(result for result in results if isinstance(result, str))
        if found:
            with self._lock:
                self.failures.update(found)
            kinds = ", ".join(f"{count} {kind}" for kind, count in found.most_common())
            logging.getLogger("opd_ds").warning(
                "reward %s: %d of %d images have no score (%s)", self._name, found.total(), len(results), kinds
            )
        scores = [torch.nan if isinstance(result, str) else result for result in results]
        return torch.tensor(scores, dtype=torch.float32)


class CountsGaps:
    """What a reward that closes its scores with `Gaps` tells about them."""

    _gaps: Gaps

    @property
    def failures(self) -> Counter[str]:
        """Images without a score, by kind, since the reward was built."""
        return self._gaps.failures
