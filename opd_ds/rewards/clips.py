"""Drawn videos, and how rewards score them: frame by frame, or as a whole where a reward says that it takes clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from opd_ds.rewards.base import Metadata, Needs, Reward
from opd_ds.rewards.references import References, score_with, takes_references

if TYPE_CHECKING:  # as in base.py
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """A drawn video.

    Attributes:
        frames: RGB images of one size, in order.
        fps: frames per second.
    """

    frames: tuple[Image.Image, ...]
    fps: float

    def spread(self, count: int | None) -> Clip:
        """`count` of the frames, the middles of equally long parts, in the same time; all where there are no more."""
        total = len(self.frames)
        if count is None or count >= total:
            return self
        chosen = [(2 * part + 1) * total // (2 * count) for part in range(count)]
        return Clip(tuple(self.frames[place] for place in chosen), self.fps * count / total)


# What a model draws: an image (`PIL.Image.Image`, which is not imported here) or a clip.
Drawn: TypeAlias = "Image.Image | Clip"


def takes_clips(reward: object) -> bool:
    """Whether the reward (or the class or function of one) says so; without a word it takes images."""
    return bool(getattr(reward, "takes_clips", False))


class OfClips:
    """Any reward as one of clips. One that takes images gives a clip the mean over its frames: of those that have a
    score, so NaN where none has.

    Args:
        frames: how many of a clip's frames the reward gets, see `Clip.spread`; None: all.
    """

    takes_clips: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()

    def __init__(self, reward: Reward, frames: int | None = None) -> None:
        self.name, self._reward, self._frames = reward.name, reward, frames
        self.takes_references = takes_references(reward)

    def identity(self) -> dict[str, Any]:
        """That of the reward, and which frames it gets."""
        return {**self._reward.identity(), "frames": self._frames or "all"}

    def score(
        self,
        clips: Sequence[Clip],
        prompts: list[str],
        metadata: Metadata | None = None,
        references: References | None = None,
    ) -> Tensor:
        """[B] float32. Each frame is beside the references of its clip.

        Raises:
            ValueError: the reward gives anything but one score per frame.
        """
        import torch

        chosen = [clip.spread(self._frames) for clip in clips]
        if takes_clips(self._reward):
            return score_with(self._reward, chosen, prompts, metadata, references)
        images = [frame for clip in chosen for frame in clip.frames]
        rows = [row for row, clip in enumerate(chosen) for _ in clip.frames]
        asked = None if metadata is None else [metadata[row] for row in rows]
        beside = None if references is None else [references[row] for row in rows]
        scores = score_with(self._reward, images, [prompts[row] for row in rows], asked, beside)
        if scores.shape != (len(images),):
            raise ValueError(f"{len(images)} frames got scores of shape {tuple(scores.shape)}")
        return torch.stack([part.nanmean() for part in scores.split([len(clip.frames) for clip in chosen])])
