"""TensorBoard: files in `run.output_dir`, no service."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import yaml
from PIL.Image import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from opd_ds.config.sections import TrackerSection
from opd_ds.evaluation.clips import as_gif
from opd_ds.rewards import Clip
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

    def clip(self, tag: str, clip: Clip, round_index: int) -> None:
        # As `add_video`, which wants moviepy and frames as numbers: an image whose file is a GIF, which pages play.
        width, height = clip.frames[0].size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=as_gif(clip))
        self._writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), round_index)

    def close(self, *, failed: bool) -> None:
        self._writer.close()
