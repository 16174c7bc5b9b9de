"""What the colour classifier sees of an object, and how it decides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from opd_ds.rewards.clip import clip_from_folder
from opd_ds.rewards.geneval.colours import TEMPLATES, ColourClassifier, crop
from opd_ds.rewards.geneval.rules import COLOURS, Detection
from tests.rewards.tiny_clip import write_clip

RGB = {
    "red": (255, 0, 0), "orange": (255, 128, 0), "yellow": (255, 255, 0), "green": (0, 160, 0), "blue": (0, 0, 255),
    "purple": (128, 0, 160), "pink": (255, 150, 190), "brown": (120, 70, 20), "black": (0, 0, 0),
    "white": (255, 255, 255),
}  # fmt: skip
GREY = (0x99, 0x99, 0x99)


def painted(
    colour: str, ground: str, box: tuple[int, int, int, int] = (10, 20, 40, 50)
) -> tuple[Image.Image, Detection]:
    """A disc of `colour` in `box` on `ground`, and the detection that covers exactly the disc."""
    left, top, right, bottom = box
    y, x = np.mgrid[:80, :60]
    mask = ((x - (left + right - 1) / 2) / (right - left)) ** 2 + (
        (y - (top + bottom - 1) / 2) / (bottom - top)
    ) ** 2 < 0.25
    pixels = np.where(mask[..., None], RGB[colour], RGB[ground]).astype(np.uint8)
    return Image.fromarray(pixels), Detection("apple", 0.9, box, mask)


def test_a_crop_is_the_box_with_everything_else_grey() -> None:
    picture, detection = painted("red", "blue")
    cut = np.asarray(crop(picture, detection))
    assert cut.shape == (30, 30, 3)
    assert detection.mask is not None
    inside = detection.mask[20:50, 10:40]
    assert 0.7 < inside.mean() < 0.8  # a disc in its box
    assert (cut[inside] == RGB["red"]).all()
    assert (cut[~inside] == GREY).all()


def test_without_a_mask_the_box_stays_as_it_is() -> None:
    picture, detection = painted("red", "blue")
    cut = crop(picture, Detection("apple", 0.9, detection.box))
    np.testing.assert_array_equal(np.asarray(cut), np.asarray(picture)[20:50, 10:40])


def mean_colour(images: Sequence[Image.Image]) -> Tensor:
    """A stand-in for CLIP: colours are directions from the grey ground."""
    return torch.stack([torch.tensor(np.asarray(i, dtype=np.float32) - 0x99).mean((0, 1)) for i in images])


def named_colour(texts: Sequence[str]) -> Tensor:
    named = [next(RGB[colour] for colour in COLOURS if f" {colour}" in text) for text in texts]
    return torch.tensor(named, dtype=torch.float32) - 0x99


@pytest.mark.parametrize("colour", [colour for colour in COLOURS if colour not in ("black", "white")])
def test_names_the_objects_colour_not_the_grounds(colour: str) -> None:
    classifier = ColourClassifier(mean_colour, named_colour)
    picture, detection = painted(colour, "blue" if colour != "blue" else "red")
    assert classifier(picture, "apple", [detection]) == [colour]


def test_each_object_of_a_picture_has_its_own_colour() -> None:
    first, left = painted("red", "white", (0, 0, 20, 20))
    second, right = painted("green", "white", (30, 40, 60, 80))
    assert left.mask is not None
    both = Image.composite(first, second, Image.fromarray(left.mask))
    assert ColourClassifier(mean_colour, named_colour)(both, "apple", [right, left]) == ["green", "red"]


def test_more_objects_than_a_batch_and_one_text_pass_per_class() -> None:
    asked: list[list[str]] = []

    def texts(batch: Sequence[str]) -> Tensor:
        asked.append(list(batch))
        return named_colour(batch)

    classifier = ColourClassifier(mean_colour, texts)
    picture, detection = painted("green", "red")
    assert classifier(picture, "apple", [detection] * 20) == ["green"] * 20
    classifier(picture, "apple", [detection])
    classifier(picture, "dining table", [detection])
    assert [len(batch) for batch in asked] == [30, 30]
    assert asked[0][:3] == ["a photo of a red apple", "a photo of a red-colored apple", "a photo of a red object"]
    assert asked[1][-2] == "a photo of a white-colored dining table"


def test_clip_decides_by_the_mean_of_the_templates_directions(tmp_path: Path) -> None:
    """The whole path with a random CLIP, against the formula written out."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

    folder = write_clip(tmp_path)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPImageProcessor.from_pretrained(folder)
    tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    pictures = [painted(colour, "white") for colour in COLOURS]

    expected = []
    with torch.no_grad():
        prototypes = []
        for colour in COLOURS:
            texts = [template.format(colour=colour, label="apple") for template in TEMPLATES]
            tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
            features = model.text_projection(model.text_model(**tokens).pooler_output)
            mean = sum(row / row.norm() for row in features) / len(texts)
            prototypes.append(mean / mean.norm())
        for picture, detection in pictures:
            pixels = processor(images=crop(picture, detection), return_tensors="pt")["pixel_values"]
            feature = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0]
            similarities = [float(feature @ prototype) for prototype in prototypes]
            expected.append(COLOURS[max(range(10), key=similarities.__getitem__)])

    clip = clip_from_folder(folder, device="cpu", dtype=torch.float32, batch_size=4)
    classifier = ColourClassifier(clip.images, clip.prompts)
    assert [classifier(p, "apple", [d])[0] for p, d in pictures] == expected
