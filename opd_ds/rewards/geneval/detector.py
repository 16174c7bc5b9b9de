"""GenEval's object detector: Mask2Former with Swin-S on COCO, run by transformers."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from opd_ds.rewards.geneval import pipeline
from opd_ds.rewards.geneval.convert import mask2former_from_mmdet
from opd_ds.rewards.geneval.rules import CLASSES, THRESHOLD, Detection
from opd_ds.rewards.weights import WrongWeightsError
from opd_ds.utils.hashing import file_sha256

if TYPE_CHECKING:
    from transformers import Mask2FormerForUniversalSegmentation


class Detector:
    """Finds COCO objects with their masks, through mmdet's test pipeline and post-processing.

    Args:
        path: mmdet's published checkpoint (2.x or 3.x key names), or a folder in transformers' layout. Such a folder,
            facebook/mask2former-swin-small-coco-instance for one, was trained elsewhere: it detects differently, and
            GenEval numbers from it are not comparable with published ones. `identity` says which one it was.
        device: where the network runs.
        unsafe_load: read the checkpoint with full unpickling, which can run code that the file contains.

    Raises:
        WrongWeightsError: the file is not such a detector, or safe loading refuses it.
    """

    def __init__(self, path: Path, device: str = "cpu", unsafe_load: bool = False) -> None:
        self._path = path
        model = _from_folder(path) if path.is_dir() else mask2former_from_mmdet(_state(path, unsafe_load), str(path))
        if model.config.num_labels != len(CLASSES):
            raise WrongWeightsError(f"{path} knows {model.config.num_labels} classes; GenEval needs COCO's 80")
        self._model = model.to(device)
        self._device = device

    def identity(self) -> dict[str, Any]:
        engine = "transformers folder (not comparable with published GenEval)" if self._path.is_dir() else "mmdet file"
        return {
            "detector": f"Mask2Former, {engine}",
            "detector_sha256": file_sha256(self._path),
            "detector_preprocessing": pipeline.DESCRIPTION,
        }

    @torch.no_grad()
    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Objects of each RGB image above GenEval's lower threshold of 0.3.

        Neighbours of equal size share a forward pass. Masks are as large as their image.
        """
        prepared = [pipeline.prepare(image) for image in images]
        detections = []
        for _, group in groupby(prepared, key=lambda p: p.pixels.shape):
            members = list(group)
            class_logits, mask_logits = self.logits(torch.stack([member.pixels for member in members]))
            for classes, masks, member in zip(class_logits, mask_logits, members, strict=True):
                detections.append(_detections(pipeline.instances(classes, masks, member)))
        return detections

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, Q, 81], the last for no object, and mask logits [B, Q, H / 4, W / 4], of [B, 3, H, W]."""
        output = self._model(pixel_values=pixels.to(self._device))
        return output.class_queries_logits, output.masks_queries_logits


def _detections(found: pipeline.Instances) -> list[Detection]:
    sure = found.scores > THRESHOLD
    scores, labels, boxes = found.scores[sure].tolist(), found.labels[sure].tolist(), found.boxes[sure].tolist()
    masks = found.masks[sure].cpu().numpy()
    return [
        Detection(CLASSES[label], score, (box[0], box[1], box[2], box[3]), mask)
        for score, label, box, mask in zip(scores, labels, boxes, masks, strict=True)
    ]


def _state(path: Path, unsafe_load: bool) -> Mapping[str, Tensor]:
    """The checkpoint's tensors: its `state_dict`, or itself when it is one."""
    try:
        # mmdet's checkpoints carry training notes beside the tensors; `unsafe_load` is the user's word for the file.
        checkpoint = torch.load(path, map_location="cpu", weights_only=not unsafe_load)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = re.split(r"[\n.]", str(error).strip())[0]
        raise WrongWeightsError(
            f"{path}: torch refuses to load it safely ({reason}). If its sha256 is the published one, set "
            f"unsafe_load: true, which lets the file run code on this machine; otherwise fetch it again"
        ) from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WrongWeightsError(f"{path} holds no state_dict; expected is a checkpoint of mmdet's Mask2Former")
    return state


def _from_folder(path: Path) -> Mask2FormerForUniversalSegmentation:
    from transformers import Mask2FormerForUniversalSegmentation

    try:
        model, report = Mask2FormerForUniversalSegmentation.from_pretrained(
            path, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WrongWeightsError(f"{path}: {' '.join(str(error).split())[:300]}") from error
    wrong = {kind: sorted(report[kind])[:3] for kind in ("missing_keys", "mismatched_keys") if report[kind]}
    if wrong:
        raise WrongWeightsError(f"{path} is not a Mask2Former that transformers loads completely: {wrong}")
    return model.eval()
