"""GenEval's colour classifier: CLIP, zero-shot, on the object cut out of its image.

Source: `ImageCrops` and `color_classification` in evaluate_images.py of github.com/djghosh13/geneval, with
`zero_shot_classifier` of clip_benchmark 1.4.0. There the images go through float16 autocast; here everything is
float32, so a colour on the border between two may come out differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from opd_ds.rewards.geneval.rules import COLOURS, Detection

GREY = "#999"
TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")

ImageEmbedder = Callable[[Sequence[Image.Image]], Tensor]
TextEmbedder = Callable[[Sequence[str]], Tensor]


class ColourClassifier:
    """Names the colour of objects of one class.

    Args:
        embed_images: images to [N, D] embeddings, of any length.
        embed_texts: texts to [N, D] embeddings in the same space.
    """

    def __init__(self, embed_images: ImageEmbedder, embed_texts: TextEmbedder) -> None:
        self._embed_images = embed_images
        self._embed_texts = embed_texts
        self._prototypes = cache(self._class_prototypes)

    def __call__(self, image: Image.Image, label: str, objects: Sequence[Detection]) -> list[str]:
        """One of COLOURS for each object of class `label` in `image`."""
        features = self._embed_images([crop(image, detection) for detection in objects])
        similarity = F.normalize(features.float(), dim=-1) @ self._prototypes(label).T
        return [COLOURS[index] for index in similarity.argmax(1).tolist()]

    def _class_prototypes(self, label: str) -> Tensor:
        """[10, D], unit length: for each colour the mean over the templates' unit embeddings."""
        texts = [template.format(colour=colour, label=label) for colour in COLOURS for template in TEMPLATES]
        features = F.normalize(self._embed_texts(texts).float(), dim=-1)
        return F.normalize(features.unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(1), dim=-1)


def crop(image: Image.Image, detection: Detection) -> Image.Image:
    """The detection's box out of an RGB image; what is not the object is grey."""
    if detection.mask is not None:
        ground = Image.new("RGB", image.size, GREY)
        image = Image.composite(image, ground, Image.fromarray(detection.mask))
    left, top, right, bottom = (round(side) for side in detection.box)
    return image.crop((left, top, right, bottom))
