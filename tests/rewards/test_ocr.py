"""OCR: the rules for targets, the formula, the real models of rapidocr, both interfaces of paddleocr."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_ds.errors import UserError
from opd_ds.rewards import RewardUnavailableError, build, check
from opd_ds.rewards.ocr import normalise, target_text, text_score
from tests.rewards.drawing import drawn, flat

TARGETS: list[tuple[str, dict[str, Any], str]] = [
    ('A sign that says "Open Now"', {}, "opennow"),
    ("A sign that says “Open Now”", {}, "opennow"),
    ("A sign that says „Offen“", {}, "offen"),
    ('mixed “Open"', {}, "open"),
    ('One shop "Open", the other "Closed"', {}, "openclosed"),
    ("\"It's 5 o'clock\"", {}, "it's5o'clock"),
    ('an empty quote ""', {}, ""),
    ('blanks only "  "', {}, ""),
    ("no quotes at all", {}, ""),
    ('a 12" ruler', {}, ""),
    ('A 27" monitor that shows "HELLO"', {}, "hello"),
    ('A 27 " monitor that shows "HELLO"', {}, "hello"),
    ('A 27"x40" poster that says "HELLO"', {}, "hello"),
    ('A man of 5\'11" holds the sign "HELLO"', {}, "hello"),
    ("A 62” screen with the sign “HELLO”", {}, "hello"),
    ('A 3½" disk, "HELLO"', {}, "hello"),
    ('the number 7 "HELLO"', {}, "hello"),
    ('"Route 66" and "24"', {}, "route6624"),
    ('“She said "HI" to me”', {}, 'shesaid"hi"tome'),
    ('"She said “HI” to me"', {}, "shesaid“hi”tome"),
    ('one “A” and one "B"', {}, "ab"),
    ('a sign \\"HELLO\\"', {}, "hello"),
    ("”hej”", {}, "hej"),
    ('写着"你好"的牌子', {}, "你好"),
    ("'HELLO' isn't quoted", {}, ""),
    ('"Hello', {}, ""),
    ('says "Open" and "Hello', {}, "open"),
    ("", {}, ""),
    ('says "Open"', {"text": "Closed"}, "closed"),
    ("no quotes", {"text": "Closed Now"}, "closednow"),
    ('says "Open"', {"text": ""}, ""),
    ('says "Open"', {"text": None}, "open"),
    ("a year", {"text": 2024}, "2024"),
    ('says "Open"', {"text": ["Closed"]}, ""),
    ('says "Open"', {"text": True}, ""),
    ('says "Ünïcode 漢字"', {"tag": "ocr"}, "ünïcode漢字"),
]


@pytest.mark.parametrize(("prompt", "metadata", "expected"), TARGETS)
def test_what_the_picture_should_say(prompt: str, metadata: dict[str, Any], expected: str) -> None:
    assert target_text(prompt, metadata) == expected


def edit_distance(a: str, b: str) -> int:
    """Wagner and Fischer's table, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


@given(st.text("abc1", max_size=8), st.text("abc1", min_size=1, max_size=8))
def test_the_score_is_one_minus_the_normalised_edit_distance(read: str, target: str) -> None:
    expected = max(0.0, 1 - edit_distance(read, target) / len(target))
    assert text_score(read, target) == pytest.approx(expected)


def test_text_beside_the_target_costs() -> None:
    assert text_score("xxopen", "open") == pytest.approx(0.5)


@pytest.fixture(scope="module")
def ocr() -> Any:
    return build("ocr", workers=2)


def test_the_real_models_read(ocr: Any, caplog: pytest.LogCaptureFixture) -> None:
    words = ["Hello World", "OPEN", "Coffee 42"]
    images = [*(drawn(word) for word in words), drawn("Good\nMorning"), drawn("OPEN"), flat("red"), drawn("OPEN")]
    prompts = [*(f'a sign "{word}"' for word in words), 'a "Good Morning"', 'a "0PXN"', 'a "word"', "no quotes"]
    before = dict(ocr.failures)
    scores = ocr.score(images, prompts)
    assert scores.dtype == torch.float32
    assert scores[:4].tolist() == [1.0] * 4
    assert scores[4] == pytest.approx(0.5)  # two letters of four
    assert scores[5] == 0  # nothing to read is an answer, and a wrong one
    assert scores[6].isnan()
    assert sum(ocr.failures.values()) - sum(before.values()) == 1
    assert "1 of 7 images have no score (1 without a text to look for)" in caplog.text


def test_a_quotation_that_is_never_closed_asks_for_nothing(ocr: Any) -> None:
    scores = ocr.score([drawn("Hello")] * 2, ['a sign that says "Hello', 'a sign that says "Hello"'])
    assert scores[0].isnan()  # Flow-GRPO's scorer gives 1 here, and looks for all of `Hello in red` where more follows
    assert scores[1] == 1


def test_every_mode_of_picture_is_read(ocr: Any) -> None:
    modes = ["RGB", "L", "RGBA", "P", "1", "CMYK"]
    scores = ocr.score([drawn("OPEN").convert(mode) for mode in modes], ['"open"'] * len(modes))
    assert scores.tolist() == [1.0] * len(modes)


def test_one_broken_picture_is_one_gap(ocr: Any) -> None:
    scores = ocr.score([drawn("OPEN"), object(), drawn("OPEN")], ['"open"'] * 3)
    assert scores.isnan().tolist() == [False, True, False]
    assert ocr.failures["failed in the engine: AttributeError"] == 1


def test_identity_names_engine_and_models(ocr: Any) -> None:
    identity = ocr.identity()
    assert identity["engine"].startswith("rapidocr 3.")
    assert sorted(identity["models"]) == ["PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"]
    assert all(len(digest) == 64 for digest in identity["models"].values())


class Paddle2:
    """The interface of paddleocr 2.x, as far as it is used."""

    def __init__(self, use_angle_cls: bool, lang: str, use_gpu: bool, show_log: bool, **folders: str) -> None:
        self.folders = folders

    def ocr(self, img: np.ndarray, cls: bool) -> list[Any]:
        blue, _, red = img[0, 0]
        if red == 255 and blue == 0:
            return [None]  # nothing found
        box = [[0, 0], [1, 0], [1, 1], [0, 1]]
        return [[[box, ("Good", 0.9)], [box, ("ghost", 0.0)], [box, ("Morning", 0.8)]]]


class Paddle3:
    """The interface of paddleocr 3.x; it refuses the arguments of 2.x."""

    def __init__(
        self,
        lang: str,
        device: str,
        use_doc_orientation_classify: bool,
        use_doc_unwarping: bool,
        use_textline_orientation: bool,
        text_detection_model_dir: str | None = None,
    ) -> None:
        assert device == "cpu"

    def predict(self, image: np.ndarray) -> list[dict[str, Any]]:
        blue, _, red = image[0, 0]
        found = [] if red == 255 and blue == 0 else ["Good", "ghost", "Morning"]
        return [{"rec_texts": found, "rec_scores": [0.9, 0.0, 0.8][: len(found)]}]


@pytest.mark.parametrize("interface", [Paddle2, Paddle3])
def test_both_interfaces_of_paddleocr(interface: type, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("paddleocr", "paddle"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__version__ = "9.9"  # type: ignore[attr-defined]
        module.PaddleOCR = interface  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    folder = "det_model_dir" if interface is Paddle2 else "text_detection_model_dir"
    reward = build("ocr", engine="paddleocr", engine_options={folder: "somewhere"})
    scores = reward.score([flat("blue"), flat("red")], ['"good morning"'] * 2)
    assert scores.tolist() == [1.0, 0.0]
    assert reward.identity()["engine"] == "paddleocr 9.9"


def test_paddleocr_absent_is_one_pip_line() -> None:
    with pytest.raises(RewardUnavailableError, match=r"pip install paddlepaddle==3.3.1 paddleocr==3.7.0 rap"):
        check("ocr", options={"engine": "paddleocr"})


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="engine = 'rapid': unknown; allowed: rapidocr, paddleocr"):
        build("ocr", engine="rapid")
    with pytest.raises(UserError, match="workers = 0"):
        build("ocr", workers=0)


def test_normalising() -> None:
    assert normalise(" Two\n Lines\t") == "twolines"
