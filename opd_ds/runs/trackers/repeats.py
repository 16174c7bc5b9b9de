"""A resumed run repeats the rounds after its checkpoint; trackers that cannot forget get no record twice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL.Image import Image

from opd_ds.rewards import Clip
from opd_ds.runs.trackers.base import Tracker


class WithoutRepeats(Tracker):
    """Hands a record to a tracker only if no earlier attempt of the run did.

    What was handed over is in a file of the run and not asked of the tracker: not all of them can be asked offline.

    Args:
        file: one line per record.
        goes_on: the tracker goes on with a run that it has; else the file begins anew.
    """

    def __init__(self, tracker: Tracker, file: Path, *, goes_on: bool) -> None:
        self._tracker = tracker
        file.parent.mkdir(exist_ok=True)
        self._handed = set(file.read_text(encoding="utf-8").splitlines()) if goes_on and file.is_file() else set()
        self._file = file.open("a" if goes_on else "w", encoding="utf-8")

    def scalars(self, values: Mapping[str, float], round_index: int) -> None:
        # The first name tells the record of a round, its held-out rewards and each reward of `watch` apart.
        record = f"{round_index} {next(iter(values))}"
        if record not in self._handed:
            self._tracker.scalars(values, round_index)
            self._remember(record)

    def image(self, tag: str, image: Image, round_index: int) -> None:
        record = f"{round_index} image {tag}"
        if record not in self._handed:
            self._tracker.image(tag, image, round_index)
            self._remember(record)

    def clip(self, tag: str, clip: Clip, round_index: int) -> None:
        record = f"{round_index} clip {tag}"
        if record not in self._handed:
            self._tracker.clip(tag, clip, round_index)
            self._remember(record)

    def close(self, *, failed: bool) -> None:
        self._file.close()
        self._tracker.close(failed=failed)

    def _remember(self, record: str) -> None:
        self._file.write(record + "\n")
        self._file.flush()
