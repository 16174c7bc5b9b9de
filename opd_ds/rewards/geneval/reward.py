"""The reward `geneval`: detector, colour classifier and rules together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.rewards.base import Metadata, Needs, batches
from opd_ds.rewards.checkpoints import located, still_needed
from opd_ds.rewards.clip import clip_from_folder
from opd_ds.rewards.gaps import CountsGaps, Gaps, Result
from opd_ds.rewards.geneval.colours import ColourClassifier
from opd_ds.rewards.geneval.detector import Detector
from opd_ds.rewards.geneval.pipeline import upright
from opd_ds.rewards.geneval.rules import Detection, Task, is_correct, keep, partial_score
from opd_ds.rewards.pictures import centre_crop_torchvision
from opd_ds.rewards.weights import Weights
from opd_ds.utils.hashing import file_sha256

Mode = Literal["strict", "partial"]
_CROPS = 16  # per forward of CLIP
_NO_TASK, _UNREADABLE = "without GenEval metadata", "unreadable"

DETECTOR = Weights(
    folder="geneval",
    source="https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco",
    file="mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth",
    size="about 280 MB",
    # OpenMMLab puts the first eight digits of a file's hash into its name.
    sha256="c9d0c4f2",
)
CLIP = Weights(folder="clip-vit-large-patch14", source="openai/clip-vit-large-patch14", file=None, size="1.7 GB")


def _known_mode(mode: Any) -> Mode:
    if mode not in get_args(Mode):
        raise UserError(f"reward 'geneval': mode = {mode!r}; allowed: {', '.join(get_args(Mode))}")
    return mode


class GenEval(CountsGaps):
    """Whether the image holds the objects that the prompt asks for, in number, colour and place (arXiv 2310.11513).

    The prompt's metadata is a line of GenEval's prompt file (`tag`, `include`, `exclude`); a prompt without it is NaN.
    No unit. Range by `mode`:
      - strict, the default: 1 or 0, the benchmark's own verdict, so that a mean is a published GenEval number;
        its overall is the mean of the tags' means (`tag_means`), not of the images.
      - partial: the mean of sub-scores that Flow-GRPO trains on, at most 1, negative where far too many objects are
        found (down to -14 for 16 instead of 1).

    Args:
        device: where both networks run.
        weights: the detector, see `Detector`; default is the published file below `weights_root()`.
        clip_weights: transformers folder of CLIP ViT-L/14; default below `weights_root()` or the hub's cache.
        mode: see above.
        batch_size: images per pass of the detector.
        unsafe_load: see `Detector`.

    Raises:
        WeightsMissingError, WrongWeightsError: absent or wrong weights.
        UserError: unknown mode.
    """

    name = "geneval"
    needs: ClassVar[Needs] = Needs(weights=(DETECTOR, CLIP))

    def __init__(
        self,
        device: str = "cpu",
        weights: str | Path | None = None,
        clip_weights: str | Path | None = None,
        mode: Mode = "strict",
        batch_size: int = 4,
        unsafe_load: bool = False,
    ) -> None:
        self._mode = _known_mode(mode)
        self._batch_size = batch_size
        self._clip_path = located(CLIP, clip_weights)
        self._detector = Detector(located(DETECTOR, weights), device, unsafe_load)
        clip = clip_from_folder(
            self._clip_path,
            device=device,
            dtype=torch.float32,
            batch_size=_CROPS,
            preprocess=centre_crop_torchvision,  # as open_clip's transform, which GenEval uses
        )
        self._colours = ColourClassifier(clip.images, clip.prompts)
        self._gaps = Gaps(self.name)

    @classmethod
    def needs_for(cls, options: Mapping[str, Any]) -> Needs:
        """Without the published weights that `options` replace.

        Raises:
            UserError: an unknown mode.
        """
        _known_mode(options.get("mode", "strict"))
        return still_needed(cls.needs, options, "weights", "clip_weights")

    def identity(self) -> dict[str, Any]:
        return {
            "engine": f"GenEval, {self._mode}",
            **self._detector.identity(),
            "colours": "CLIP zero-shot, float32, grey background, box crop",
            "clip_sha256": file_sha256(self._clip_path),
        }

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32.

        Raises:
            UserError: metadata of GenEval's form that asks for something GenEval does not know.
        """
        results: list[Result] = [_NO_TASK] * len(images)
        asked: list[tuple[int, Image.Image, Task]] = []
        for index, (image, item) in enumerate(zip(images, metadata or [{}] * len(images), strict=True)):
            task = Task.parse(item)
            if task is None:
                continue
            try:
                asked.append((index, upright(image), task))
            except (OSError, ValueError, SyntaxError):  # Pillow's, for truncated and damaged files
                results[index] = _UNREADABLE
        for part in batches(asked, self._batch_size):
            found = self._detector.detect([picture for _, picture, _ in part])
            for (index, picture, task), objects in zip(part, found, strict=True):
                results[index] = self._score_one(picture, task, objects)
        return self._gaps.close(results)

    def _score_one(self, image: Image.Image, task: Task, objects: list[Detection]) -> float:
        rule = is_correct if self._mode == "strict" else partial_score
        return float(rule(keep(objects, task.tag), task, partial(self._colours, image)))
