"""Rewards of edited pictures: small random weights in the published layouts, and what comes out whatever they are."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from opd_ds.errors import UserError
from opd_ds.rewards import RewardUnavailableError, WrongWeightsError, build, check, takes_of
from opd_ds.rewards.base import Takes
from opd_ds.rewards.clip import CLIPEncoder
from tests.rewards.clip_world import pictures, write_clip_folder
from tests.rewards.tiny_weights import make

CAPTIONS = {"source_caption": "a cat", "target_caption": "a red cat"}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_folder(tmp_path_factory.mktemp("clip"))


def test_clip_direction_is_the_cosine_of_the_two_differences(clip_folder: Path) -> None:
    reward, clip = build("clip_direction", weights=clip_folder), build("clipscore", weights=clip_folder)._clip
    before, after, other = pictures()
    rows = [CAPTIONS, CAPTIONS, CAPTIONS | {"target_caption": "a dog, green"}]
    scores = reward.score([after, before, other], ["x"] * 3, rows, [(before,), (before,), (after, before)])
    images, texts = clip.images([before, after, other]), clip.prompts(["a cat", "a red cat", "a dog, green"])
    expected = [
        F.cosine_similarity(images[1] - images[0], texts[1] - texts[0], dim=0),
        torch.tensor(0.0),  # nothing was edited
        F.cosine_similarity(images[2] - images[1], texts[2] - texts[0], dim=0),
    ]
    assert torch.allclose(scores, torch.stack(expected), atol=1e-6)
    by_prompt = build("clip_direction", weights=clip_folder, target="prompt")
    assert by_prompt.score([after], ["a red cat"], [CAPTIONS], [(before,)]).item() == pytest.approx(scores[0].item())
    assert by_prompt.identity()["target"] == "prompt"


def test_clip_direction_is_1_along_the_texts_and_minus_1_against_them(
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = build("clip_direction", weights=clip_folder)
    texts = {"a cat": [1.0, 0.0, 0.0], "a red cat": [0.0, 1.0, 0.0]}
    images = {"white": [0.0, 0.6, 0.8], "red": [-0.6, 0.0, 0.8], "blue": [0.8, 0.0, 0.6]}
    edits = {"red": [-0.5, 1.1, 0.8], "blue": [0.5, 0.1, 0.8]}  # white's own, with and against the texts' direction
    known = images | edits
    named = {Image.new("RGB", (2, 2), name).getpixel((0, 0)): name for name in images}
    monkeypatch.setattr(CLIPEncoder, "prompts", lambda _, asked: torch.tensor([texts[one] for one in asked]))
    monkeypatch.setattr(
        CLIPEncoder, "images", lambda _, asked: torch.tensor([known[named[one.getpixel((0, 0))]] for one in asked])
    )
    white, red, blue = (Image.new("RGB", (2, 2), name) for name in images)
    scores = reward.score([red, blue], ["x"] * 2, [CAPTIONS] * 2, [(white,), (white,)])
    assert scores.tolist() == pytest.approx([1, -1])


def test_clip_direction_without_what_it_reads_has_no_score(clip_folder: Path) -> None:
    reward = build("clip_direction", weights=clip_folder)
    image, rows = pictures()[0], [{"source_caption": "a"}, CAPTIONS, CAPTIONS | {"target_caption": "a cat"}]
    assert reward.score([image] * 3, ["x"] * 3, rows, [(image,), (), (image,)]).isnan().all()
    assert reward.failures == {
        "prompt without 'target_caption'": 1,
        "prompt without a reference picture": 1,
        "prompt with equal 'source_caption' and 'target_caption'": 1,
    }
    assert reward.score([image], ["x"]).isnan().all()
    assert takes_of("clip_direction") == Takes(references=True, columns=("source_caption", "target_caption"))
    assert takes_of("clip_direction", options={"source": "old", "target": "prompt"}).columns == ("old",)
    parts = {"jpeg_compressibility": 1, "clip_direction": 1}
    assert takes_of("mix", options={"parts": parts}) == takes_of("clip_direction")
    assert takes_of("vlm_judge", options={"references": True}) == Takes(references=True)


def test_dino_is_the_cosine_of_the_class_tokens(tmp_path: Path) -> None:
    from transformers import BitImageProcessorPil, Dinov2Model

    folder = Path(make("dino", tmp_path)["weights"])
    reward, images = build("dino", weights=folder, batch_size=2), pictures()
    scores = reward.score(images, ["x"] * 3, None, [(images[0],), (images[0],), ()])
    processor = BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    with torch.no_grad():
        pixels = processor(images[:2], return_tensors="pt").pixel_values
        first, second = Dinov2Model.from_pretrained(folder).eval()(pixels).last_hidden_state[:, 0]
    assert scores[:2].tolist() == pytest.approx([1, F.cosine_similarity(first, second, dim=0).item()], abs=1e-5)
    assert scores[1] < 0.999
    assert scores[2].isnan()


# ---- LPIPS: the authors' package, with random networks ----


def alexnet() -> nn.Sequential:
    """Torchvision's `features`, in its place where torchvision is not installed."""
    widths = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
    layers: list[nn.Module] = []
    for place, (inside, out, kernel, stride, padding) in enumerate(widths):
        layers += [nn.Conv2d(inside, out, kernel, stride, padding), nn.ReLU()]
        if place in (0, 1, 4):
            layers.append(nn.MaxPool2d(3, 2))
    return nn.Sequential(*layers)


def written(folder: Path, **changes: Tensor | None) -> Path:
    """Torchvision's file of the network with random weights; `changes` by key, None leaves it out."""
    torch.manual_seed(3)
    state = {f"features.{key}": value for key, value in alexnet().state_dict().items()}
    state |= {"classifier.6.bias": torch.zeros(1000), **changes}
    torch.save({key: value for key, value in state.items() if value is not None}, folder / "alexnet.pth")
    return folder / "alexnet.pth"


class StandIn(nn.Module):
    """The package's class as far as it is asked: the slices of its network, and a distance of what the last says."""

    def __init__(self, net: str, pnet_rand: bool, verbose: bool) -> None:
        super().__init__()
        assert (net, pnet_rand, verbose) == ("alex", True, False)  # anything else downloads, or prints
        layers, self.net, bounds = alexnet(), nn.Module(), (0, 2, 5, 8, 10, 12)
        for number in range(1, 6):
            part = nn.Sequential()
            for place in range(bounds[number - 1], bounds[number]):
                part.add_module(str(place), layers[place])
            self.net.add_module(f"slice{number}", part)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        for part in self.net.children():
            one, other = part(one), part(other)
        return (one - other).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, or a stand-in where it is not installed."""
    monkeypatch.setattr("opd_ds.rewards.base.find_spec", lambda name: True)
    module: Any = ModuleType("lpips")
    module.LPIPS = StandIn
    monkeypatch.setitem(sys.modules, "lpips", module)


def check_distances(reward: Any) -> None:
    before, after, _ = pictures((96, 80), (80, 96), (96, 80))
    scores = reward.score([before, after, after], ["x"] * 3, None, [(before,), (before,), ()])
    assert scores[0] == 0
    assert scores[1] > 1e-6
    assert scores[2].isnan()
    resized = before.resize(after.size, Image.Resampling.BICUBIC)
    assert reward.score([after], ["x"], None, [(resized,)]).item() == scores[1].item()


def test_lpips_is_0_for_an_unchanged_picture(tmp_path: Path, package: None) -> None:
    reward = build("lpips", weights=written(tmp_path))
    check_distances(reward)
    assert reward.identity()["net"] == "alex"
    loaded, state = reward._model.net.state_dict(), torch.load(tmp_path / "alexnet.pth")
    assert torch.equal(loaded["slice1.0.weight"], state["features.0.weight"])
    assert torch.equal(loaded["slice5.10.bias"], state["features.10.bias"])


def test_lpips_with_the_authors_package(tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    check_distances(build("lpips", weights=written(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features.3.bias": None}, "1 missing keys, the first is 3.bias"),
        ({"features.30.bias": torch.zeros(3)}, "1 unexpected keys, the first is 30.bias"),
        ({"features.0.bias": torch.zeros(3)}, "size mismatch"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, package: None, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongWeightsError, match=f"is no such network: .*{said}") as error:
        build("lpips", weights=written(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_what_lpips_needs_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("opd_ds.rewards.base.find_spec", lambda name: None)
    with pytest.raises(RewardUnavailableError, match=r"needs lpips, torchvision: pip install 'opd-ds\[lpips\]'"):
        check("lpips")
    with pytest.raises(UserError, match="reward 'lpips': net = 'squeeze'; allowed: alex, vgg"):
        check("lpips", options={"net": "squeeze"})
    monkeypatch.setenv("OPD_DS_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("opd_ds.rewards.base.find_spec", lambda name: True)
    with pytest.raises(UserError, match=r"vgg16-397923af.pth from https://download.pytorch.org/models/"):
        check("lpips", options={"net": "vgg"})
