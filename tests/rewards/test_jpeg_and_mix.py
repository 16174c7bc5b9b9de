"""The rewards that need no weights, and mixes of rewards."""

from __future__ import annotations

import io
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from opd_ds.errors import UserError
from opd_ds.rewards import Needs, RewardUnavailableError, Weights, WeightsMissingError, build, check, registry
from tests.rewards.drawing import drawn, flat


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return [flat("red", 64), drawn("Text", 64), Image.fromarray(noise)]


def test_jpeg_size_is_in_kilobytes_and_signed() -> None:
    expected = []
    for picture in pictures():
        buffer = io.BytesIO()
        picture.save(buffer, "jpeg", quality=95)
        expected.append(len(buffer.getvalue()) / 1000)
    assert expected == sorted(expected)
    more = build("jpeg_incompressibility").score(pictures(), [""] * 3)
    less = build("jpeg_compressibility").score(pictures(), [""] * 3)
    assert more.tolist() == pytest.approx(expected)
    assert torch.equal(less, -more)


def test_jpeg_takes_pictures_with_transparency() -> None:
    assert build("jpeg_incompressibility").score([flat("red").convert("RGBA")], [""]).item() > 0


class Letters:
    """The number of letters of the prompt; NaN for an empty one."""

    name = "letters"
    needs: ClassVar[Needs] = Needs()

    def __init__(self, device: str = "cpu", factor: float = 1.0) -> None:
        self.device, self.factor = device, factor

    def identity(self) -> dict[str, Any]:
        return {"engine": "len", "factor": self.factor}

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> torch.Tensor:
        return torch.tensor([self.factor * len(p) if p else torch.nan for p in prompts])


class Needy(Letters):
    name = "needy"
    needs: ClassVar[Needs] = Needs(packages=("absent_one",), extra="ocr")


class Weighty(Letters):
    name = "weighty"
    needs: ClassVar[Needs] = Needs(weights=(Weights("somewhere", "org/name", "model.bin", "1 GB"),))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for reward in (Letters, Needy, Weighty):
        monkeypatch.setitem(registry._BUILT_IN, reward.name, f"{__name__}:{reward.__name__}")


def test_a_mix_is_the_weighted_sum() -> None:
    mix = build("mix", parts={"letters": 2, "jpeg_compressibility": {"weight": 0.5}})
    images, prompts = [flat("red"), flat("blue")], ["four", ""]
    alone = build("jpeg_compressibility").score(images, prompts)
    scores = mix.score(images, prompts)
    assert scores[0].item() == pytest.approx(8 + 0.5 * alone[0].item())
    assert scores[1].isnan()  # a part that cannot judge leaves no score


def test_parts_have_options_labels_and_the_device_and_nest() -> None:
    inner = {"reward": "mix", "parts": {"letters": 1}, "weight": -1}
    mix = build("mix", device="meta", parts={"twice": {"reward": "letters", "factor": 2.0}, "inner": inner})
    assert mix.score([flat("red")], ["four"]).tolist() == [4.0]
    identity = mix.identity()
    assert identity["twice"] == {"reward": "letters", "weight": 1.0, "engine": "len", "factor": 2.0}
    assert identity["inner"]["letters"]["factor"] == 1.0
    assert mix._parts[0][2].device == "meta"


def test_a_check_finds_what_the_parts_need(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_DS_WEIGHTS", str(tmp_path))
    with pytest.raises(RewardUnavailableError, match=r"'mix' needs absent_one: pip install 'opd-ds\[ocr\]'$"):
        check("mix", options={"parts": {"letters": 1, "needy": 1}})
    with pytest.raises(WeightsMissingError, match=r"model\.bin from org/name"):
        check("mix", options={"parts": {"inner": {"reward": "mix", "parts": {"weighty": 1}}}})
    check("mix", options={"parts": {"letters": 1}})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "expected reward names and weights"),
        ("letters", "expected reward names and weights"),
        ({"letters": "much"}, "the weight of 'letters' is 'much'; a finite number is needed"),
        ({"letters": float("nan")}, "a finite number is needed"),
        ({"letters": True}, "a finite number is needed"),
        ({"leters": 1}, "parts.leters = 'leters': unknown reward; .* Did you mean 'letters'"),
        ({"letters": {"fctor": 1}}, "unknown option 'fctor'"),
    ],
)
def test_wrong_parts_are_said(parts: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("mix", parts=parts)
