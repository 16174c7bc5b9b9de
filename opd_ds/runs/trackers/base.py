"""What a tracker is: a service or a folder that keeps a run's numbers and images for people to look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from opd_ds.config.sections import TrackerSection
from opd_ds.evaluation.clips import strip
from opd_ds.rewards import Clip


@dataclass(frozen=True)
class TrackedRun:
    """What trackers are told of a run.

    Attributes:
        name: the last part of `run.output_dir`.
        folder: `run.output_dir`.
        config: resolved, without secrets.
        rewards: their identities by label, likewise.
        rounds_done: above 0, the run is resumed, and a tracker goes on with the run that it has.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    rewards: dict[str, Any]
    rounds_done: int

    @property
    def parameters(self) -> dict[str, Any]:
        """What decides the run, for trackers that show such things by name."""
        return self.config | {"rewards": self.rewards}

    @property
    def kept(self) -> Path:
        """What trackers keep on disk: ids of runs, and the data of those that are offline."""
        return self.folder / "trackers"

    def known_id(self, tracker: str) -> str | None:
        """The tracker's own id of this run, where the run is resumed."""
        file = self._id_file(tracker)
        return file.read_text().strip() if self.rounds_done and file.is_file() else None

    def keep_id(self, tracker: str, run_id: str) -> None:
        self.kept.mkdir(exist_ok=True)
        self._id_file(tracker).write_text(run_id + "\n")

    def _id_file(self, tracker: str) -> Path:
        return self.kept / f"{tracker}.run_id"


class Tracker(ABC):
    """Opened once a run, on rank 0, in a thread of its own (`BackgroundTracker`): every call is from that thread."""

    @abstractmethod
    def __init__(self, section: TrackerSection, run: TrackedRun) -> None:
        """Start a run of the tracker, or go on with the one that `run` has an id of."""

    @abstractmethod
    def scalars(self, values: Mapping[str, float], round_index: int) -> None:
        """Numbers of a round, by name. Rounds may come late and in any order."""

    @abstractmethod
    def image(self, tag: str, image: Image, round_index: int) -> None:
        """An RGB image of a round."""

    def clip(self, tag: str, clip: Clip, round_index: int) -> None:
        """A clip of a round; some of its frames beside each other, where the tracker has no other way."""
        self.image(tag, strip(clip), round_index)

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """Write what is left; `failed`: the run did not come to its end."""
