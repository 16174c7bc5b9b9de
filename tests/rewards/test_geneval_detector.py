"""The detector: from mmdet's checkpoint to objects found; and the reward around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.rewards import build, check
from opd_ds.rewards.geneval import GenEval, pipeline
from opd_ds.rewards.geneval.convert import mask2former_from_mmdet
from opd_ds.rewards.geneval.detector import Detector
from opd_ds.rewards.geneval.reward import CLIP
from opd_ds.rewards.geneval.rules import CLASSES, Detection
from opd_ds.rewards.weights import WeightsMissingError, WrongWeightsError
from tests.rewards import mmdet_layout as layout
from tests.rewards.tiny_clip import write_clip


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    """What mmdet 3.3.0 answered to `layout.pixels()` with `layout.state()`, as the image below."""
    return dict(np.load(Path(__file__).parent / "mmdet_tiny.npz"))


# The recorded image was 80 x 53, resized to 60 x 40, padded to 96 x 64.
RECORDED = pipeline.Prepared(layout.pixels()[0], content=(40, 60), original=(53, 80))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mmdet") / "tiny.pth"
    torch.save({"meta": {"epoch": 50, "CLASSES": ("person",)}, "state_dict": layout.state()}, path)
    return path


@pytest.fixture(scope="module")
def detector(checkpoint: Path) -> Detector:
    return Detector(checkpoint)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("naming", [layout.mmdet2_names, lambda tensors: tensors], ids=["mmdet 2.x", "mmdet 3.x"])
def test_converted_network_answers_as_mmdets_does(
    naming: Callable[[dict[str, Tensor]], dict[str, Tensor]], recorded: dict[str, np.ndarray]
) -> None:
    model = mask2former_from_mmdet(naming(layout.state()), "tiny")
    with torch.no_grad():
        output = model(pixel_values=layout.pixels())
    np.testing.assert_allclose(output.class_queries_logits[0], recorded["class_logits"], atol=1e-4)
    np.testing.assert_allclose(output.masks_queries_logits[0], recorded["mask_logits"], atol=1e-4)


def test_post_processing_answers_as_mmdets_does(recorded: dict[str, np.ndarray]) -> None:
    logits = (torch.from_numpy(recorded[name]) for name in ("class_logits", "mask_logits"))
    found = pipeline.instances(*logits, RECORDED)
    order = found.scores.argsort(descending=True)
    np.testing.assert_allclose(found.scores[order], recorded["scores"], atol=1e-6)
    np.testing.assert_array_equal(found.labels[order], recorded["labels"])
    np.testing.assert_array_equal(found.boxes[order], recorded["boxes"])
    np.testing.assert_array_equal(found.masks[order].sum((1, 2)), recorded["areas"])


def test_post_processing_step_by_step() -> None:
    """The definition in plain loops, without resizing: 3 queries, 2 classes."""
    class_logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.5, 0.0, 4.0]])
    mask_logits = torch.full((3, 8, 8), -5.0)
    mask_logits[0, 1:4, 2:7] = 2.0
    mask_logits[1, 6, 5] = 0.5  # a single pixel; the third query has none
    prepared = pipeline.Prepared(torch.zeros(3, 8, 8), content=(8, 8), original=(8, 8))

    expected = []
    for query in range(3):
        exponentials = [math.exp(value) for value in class_logits[query].tolist()]
        inside = [(y, x) for y in range(8) for x in range(8) if mask_logits[query, y, x] > 0]
        certainty = sum(1 / (1 + math.exp(-float(mask_logits[query, y, x]))) for y, x in inside)
        certainty = certainty / len(inside) if inside else 0.0
        ys, xs = [y for y, _ in inside], [x for _, x in inside]
        box = [min(xs), min(ys), max(xs) + 1, max(ys) + 1] if inside else [0, 0, 0, 0]
        expected += [(exponentials[c] / sum(exponentials) * certainty, c, box, len(inside)) for c in range(2)]

    found = pipeline.instances(class_logits, mask_logits, prepared)
    got = zip(found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), found.masks, strict=True)
    rows = sorted((score, label, box, int(mask.sum())) for score, label, box, mask in got)
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, sorted(expected), strict=True):
        assert row[0] == pytest.approx(wanted[0], abs=1e-6)
        assert row[1:] == wanted[1:]


def test_only_the_hundred_best_pairs_remain() -> None:
    class_logits = torch.randn(20, 81, generator=torch.Generator().manual_seed(0)) * 3
    prepared = pipeline.Prepared(torch.zeros(3, 8, 8), content=(8, 8), original=(8, 8))
    found = pipeline.instances(class_logits, torch.full((20, 8, 8), 50.0), prepared)
    every = class_logits.softmax(-1)[:, :-1].flatten().sort(descending=True).values
    torch.testing.assert_close(found.scores.sort(descending=True).values, every[:100])


SIZES = [(64, 64), (37, 91), (90, 300), (512, 512), (1024, 768), (800, 800), (1600, 1600), (1, 5)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_resize_is_opencvs_bit_for_bit(height: int, width: int) -> None:
    cv2 = pytest.importorskip("cv2")
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    new = pipeline.fitted_size(height, width)
    expected = cv2.resize(pixels, new[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(pipeline.resize_linear(pixels, new), expected)


@pytest.mark.parametrize(
    ("size", "fitted"), [((512, 512), (800, 800)), ((427, 640), (800, 1199)), ((300, 900), (444, 1333))]
)
def test_fitted_size(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert pipeline.fitted_size(*size) == fitted
    assert pipeline.fitted_size(*size[::-1]) == fitted[::-1]


def test_prepare_pads_with_grey_and_normalises() -> None:
    prepared = pipeline.prepare(Image.new("RGB", (300, 100), (255, 0, 128)))
    assert prepared.pixels.shape == (3, 448, 1344)
    assert (prepared.content, prepared.original) == ((444, 1333), (100, 300))
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(prepared.pixels[:, 443, 1332], (np.array([255, 0, 128]) - mean) / std, atol=1e-5)
    for y, x in ((444, 0), (0, 1333), (447, 1343)):
        np.testing.assert_allclose(prepared.pixels[:, y, x], (128 - mean) / std, atol=1e-5)


def test_detections_are_those_of_the_parts(detector: Detector) -> None:
    """Two sizes in one call; the same objects as one image at a time through the parts tested above."""
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((8, 120), (8, 120), (120, 8))
    ]
    together = detector.detect(pictures)
    assert sum(len(objects) for objects in together) > 0
    for picture, objects in zip(pictures, together, strict=True):
        prepared = pipeline.prepare(picture)
        classes, masks = detector.logits(prepared.pixels[None])
        found = pipeline.instances(classes[0], masks[0], prepared)
        sure = found.scores > 0.3
        assert [o.score for o in objects] == pytest.approx(found.scores[sure].tolist(), abs=1e-4)
        assert [o.label for o in objects] == [CLASSES[label] for label in found.labels[sure].tolist()]
        for detection in objects:
            assert detection.mask is not None
            assert detection.mask.shape == picture.size[::-1]
            ys, xs = np.nonzero(detection.mask)
            assert detection.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def _without(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name != key}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: _without(t, "backbone.norm2.weight"), "hidden_states_norms.stage3.weight"),
        (lambda t: _without(t, "panoptic_head.query_feat.weight"), "panoptic_head.query_feat.weight"),
        (lambda t: {**t, "roi_head.bbox_head.fc.weight": torch.zeros(1)}, "roi_head.bbox_head.fc.weight"),
        (lambda t: {**t, "panoptic_head.mask_embed.4.bias": torch.zeros(7)}, "mask_embedder.2.0.bias"),
        (lambda t: {"backbone.conv1.weight": torch.zeros(1)}, "not mmdet's Mask2Former"),
        (
            lambda t: {**t, **{f"panoptic_head.cls_embed.{k}": torch.zeros(9, *s) for k, s in _TWO.items()}},
            "8 classes",
        ),
    ],
    ids=["missing", "missing-size", "unknown", "shape", "another-network", "classes"],
)
def test_another_checkpoint_is_refused(change: Callable[..., dict[str, Tensor]], named: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.pth"
    torch.save({"state_dict": change(layout.state())}, path)
    with pytest.raises(WrongWeightsError) as caught:
        Detector(path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


_TWO: dict[str, tuple[int, ...]] = {"weight": (layout.HIDDEN,), "bias": ()}


class _Notes:
    """Something beside the tensors that safe loading does not know."""


def test_a_checkpoint_that_needs_unpickling_is_loaded_on_request_only(tmp_path: Path) -> None:
    path = tmp_path / "notes.pth"
    torch.save({"meta": _Notes(), "state_dict": layout.state()}, path)
    with pytest.raises(WrongWeightsError, match="unsafe_load: true"):
        Detector(path)
    assert Detector(path, unsafe_load=True).logits(layout.pixels())[0].shape == (1, layout.QUERIES, 81)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.pth"
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(WrongWeightsError, match=r"damaged\.pth"):
        Detector(path)


def test_a_transformers_folder_loads_and_is_labelled(tmp_path: Path, checkpoint: Path) -> None:
    model = mask2former_from_mmdet(layout.state(), "tiny")
    model.save_pretrained(tmp_path / "folder")
    folder = Detector(tmp_path / "folder")
    torch.testing.assert_close(folder.logits(layout.pixels())[0], Detector(checkpoint).logits(layout.pixels())[0])
    assert "not comparable" in folder.identity()["detector"]
    assert "not comparable" not in Detector(checkpoint).identity()["detector"]


def test_reward_scores_by_the_prompts_metadata(checkpoint: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole reward; what the detector finds is put in its mouth, so that the scores are known."""
    box = (0.0, 0.0, 10.0, 10.0)
    apples = [Detection("apple", score, box, np.ones((20, 30), dtype=np.bool_)) for score in (0.9, 0.8)]
    seen: list[int] = []

    def detect(self: Detector, images: list[Image.Image]) -> list[list[Detection]]:
        seen.append(len(images))
        return [apples] * len(images)

    monkeypatch.setattr(Detector, "detect", detect)
    one = {"tag": "single_object", "include": [{"class": "apple", "count": 1}]}
    four = {"tag": "counting", "include": [{"class": "apple", "count": 4}]}
    metadata = [one, {}, {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}, four, one]
    images = [Image.new("RGB", (30, 20)) for _ in metadata]
    images[-1] = _Truncated()
    prompts = ["a photo"] * len(metadata)
    scores = {
        mode: build("geneval", weights=checkpoint, clip_weights=clip, mode=mode, batch_size=2).score(
            images, prompts, metadata
        )
        for mode in ("strict", "partial")
    }
    nan = math.nan
    # Under `counting` neither apple is sure enough: 0 of 4.
    torch.testing.assert_close(scores["strict"], torch.tensor([1.0, nan, 0.0, 0.0, nan]), equal_nan=True)
    torch.testing.assert_close(scores["partial"], torch.tensor([0.0, nan, 0.0, 0.0, nan]), equal_nan=True)
    assert scores["strict"].dtype == torch.float32
    assert seen == [2, 1, 2, 1]


class _Truncated(Image.Image):
    """A file that ends too early: Pillow notices when the pixels are asked for."""

    def getexif(self) -> Any:
        raise OSError("image file is truncated")


def test_reward_end_to_end(checkpoint: Path, clip: Path) -> None:
    """Real networks, random weights: a prompt is scored as its rule says of what the detector found."""
    reward = GenEval(weights=checkpoint, clip_weights=clip)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 120, 3), dtype=np.uint8))
    (objects,) = Detector(checkpoint).detect([picture])
    present = max(objects, key=lambda o: o.score).label
    absent = next(name for name in CLASSES if name not in {o.label for o in objects})
    metadata: list[dict[str, Any]] = [
        {"tag": "single_object", "include": [{"class": name, "count": 1}]} for name in (present, absent)
    ]
    colours = [
        {"tag": "colors", "include": [{"class": present, "count": 1, "color": colour}]} for colour in ("red", "white")
    ]
    scores = reward.score([picture] * 4, [""] * 4, metadata + colours)
    assert scores[:2].tolist() == [1.0, 0.0]
    assert scores[2:].sum() <= 1  # one object has one colour
    identity = reward.identity()
    assert len(identity["detector_sha256"]) == len(identity["clip_sha256"]) == 64


def test_without_metadata_nothing_is_judged(checkpoint: Path, clip: Path) -> None:
    scores = GenEval(weights=checkpoint, clip_weights=clip).score([Image.new("RGB", (8, 8))] * 2, ["a", "b"])
    assert scores.isnan().all()


def test_wrong_options_and_absent_weights_are_named(
    checkpoint: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_DS_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="allowed: strict, partial"):
        GenEval(weights=checkpoint, clip_weights=clip, mode="lenient")  # type: ignore[arg-type]
    with pytest.raises(WeightsMissingError, match="nowhere"):
        GenEval(weights=tmp_path / "nowhere", clip_weights=clip)
    with pytest.raises(WeightsMissingError, match=r"mask2former_swin-s.*\.pth"):
        check("geneval", options={"clip_weights": str(clip)})
    check("geneval", options={"weights": str(checkpoint), "clip_weights": str(clip)})
    with pytest.raises(WeightsMissingError, match=CLIP.source):
        check("geneval", options={"weights": str(checkpoint)})
