"""TensorBoard: files in `run.output_dir`, no service."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import yaml
from PIL.Image import Image
from torch.utils.tensorboard import SummaryWriter

from opd_ds.config.sections import TrackerSection
from opd_ds.runs.trackers.base import TrackedRun, Tracker

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoard(Tracker):
    """A resumed run hides what an earlier attempt wrote of rounds after the checkpoint."""

    def __init__(self, section: TrackerSection, run: TrackedRun) -> None:
        self._writer = SummaryWriter(
            str(run.folder / TENSORBOARD_FOLDER), purge_step=run.rounds_done + 1, **section.options
        )
        for key, value in (("config", run.config), ("rewards", run.rewards)):
            self._writer.add_text(key, f"```yaml\n{yaml.safe_dump(value, sort_keys=False)}\n```", run.rounds_done)

    def scalars(self, values: Mapping[str, float], round_index: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, round_index)

    def image(self, tag: str, image: Image, round_index: int) -> None:
        self._writer.add_image(tag, np.asarray(image), round_index, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        self._writer.close()
