"""PickScore, ClipScore, HPSv2, Aesthetic: small random weights in the published layouts, computed again here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.rewards import WeightsMissingError, WrongWeightsError, build, check
from opd_ds.rewards.aesthetic import Aesthetic
from opd_ds.rewards.clipscore import ClipScore
from opd_ds.rewards.hpsv2 import HPSv2, clean
from opd_ds.rewards.pickscore import PickScore
from opd_ds.rewards.pictures import centre_crop, centre_crop_bilinear, pad_long_side
from tests.rewards.clip_world import (
    MEAN,
    PROMPTS,
    STD,
    State,
    clip_ids,
    head_state,
    open_clip_cosine,
    open_clip_state,
    pictures,
    truncated_picture,
    write_clip_folder,
    write_clip_tokenizer,
)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hps.pt as published (half precision) and the tokenizer."""
    folder = tmp_path_factory.mktemp("hps")
    state = open_clip_state(len(write_clip_tokenizer(folder)))
    torch.save({"state_dict": {key: value.half() for key, value in state.items()}}, folder / "hps.pt")
    return folder


@pytest.fixture(scope="module")
def aesthetic_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("aesthetic") / "head.pth"
    torch.save(head_state(24), file)
    return file


@pytest.fixture
def reward(request: pytest.FixtureRequest) -> Any:
    """Each of the four, by name."""
    folder = request.getfixturevalue
    if request.param == "hpsv2":
        hps = folder("hps_folder")
        return build("hpsv2", weights=hps / "hps.pt", tokenizer=hps / "tokenizer.json", batch_size=2)
    if request.param == "aesthetic":
        return build("aesthetic", weights=folder("aesthetic_head"), clip=folder("clip_folder"), batch_size=2)
    return build(request.param, weights=folder("clip_folder"), batch_size=2)


def all_four(function: Any) -> Any:
    return pytest.mark.parametrize("reward", ["pickscore", "clipscore", "hpsv2", "aesthetic"], indirect=True)(function)


def by_transformers(folder: Path, images: list[Image.Image], prompts: list[str]) -> tuple[Tensor, Tensor, float]:
    """Unit embeddings and logit scale, all through transformers' own processor, tokenizer and forward."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=processor(images, return_tensors="pt").pixel_values, **text)
    return output.image_embeds, output.text_embeds, model.logit_scale.exp().item()


def test_clipscore_is_the_cosine_and_pickscore_the_logit(clip_folder: Path) -> None:
    images = pictures()
    seen, read, scale = by_transformers(clip_folder, images, PROMPTS)
    cosine = (seen * read).sum(-1)
    assert cosine.std() > 0.01
    torch.testing.assert_close(ClipScore(weights=clip_folder).score(images, PROMPTS), cosine, atol=1e-5, rtol=0)
    pick = PickScore(weights=clip_folder).score(images, PROMPTS)
    torch.testing.assert_close(pick, scale * cosine, atol=1e-3, rtol=0)
    assert scale == pytest.approx(np.exp(4.6), rel=1e-5)


def test_aesthetic_is_the_published_chain_of_layers(clip_folder: Path, aesthetic_head: Path) -> None:
    images = pictures()
    expected, _, _ = by_transformers(clip_folder, images, PROMPTS)
    state = head_state(24)
    for layer in (0, 2, 4, 6, 7):
        expected = expected @ state[f"layers.{layer}.weight"].T + state[f"layers.{layer}.bias"]
    found = Aesthetic(weights=aesthetic_head, clip=clip_folder).score(images, PROMPTS)
    torch.testing.assert_close(found, expected[:, 0], atol=1e-5, rtol=0)


def test_hpsv2_is_the_forward_of_open_clip_on_padded_pictures(hps_folder: Path) -> None:
    images, prompts = pictures(), ["a red cat", "two dogs, on a bench over the hill", ""]
    state: State = torch.load(hps_folder / "hps.pt", weights_only=True)["state_dict"]
    vocabulary = write_clip_tokenizer(hps_folder)
    ids = torch.tensor([clip_ids(prompt, vocabulary, 16) for prompt in prompts])
    expected = open_clip_cosine(
        {key: value.float() for key, value in state.items()}, torch.stack([padded(image, 32) for image in images]), ids
    )
    assert expected.std() > 0.01
    found = HPSv2(weights=hps_folder / "hps.pt", tokenizer=hps_folder / "tokenizer.json").score(images, prompts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def cubic(t: np.ndarray) -> np.ndarray:
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))


def triangle(t: np.ndarray) -> np.ndarray:
    return np.maximum(1 - t, 0.0)


def by_matrices(pixels: np.ndarray, height: int, width: int, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[H, W, 3] to [height, width, 3], antialiased: the kernel stretched by the scale, as a matrix per axis."""

    def matrix(length: int, wanted: int) -> np.ndarray:
        step = length / wanted
        centres = (np.arange(wanted) + 0.5) * step
        weights = kernel(np.abs((np.arange(length) + 0.5)[None] - centres[:, None]) / max(step, 1.0))
        return weights / weights.sum(1, keepdims=True)

    return np.einsum("ah,hwc,bw->abc", matrix(pixels.shape[0], height), pixels, matrix(pixels.shape[1], width))


def padded(image: Image.Image, size: int) -> Tensor:
    """HPS's preprocessing by hand: cubic convolution with a = -0.5."""
    pixels = np.asarray(image, dtype=np.float64) / 255
    height, width = (max(1, round(side * size / max(pixels.shape[:2]))) for side in pixels.shape[:2])
    small = by_matrices(pixels, height, width, cubic)
    canvas = np.zeros((size, size, 3))
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top : top + height, left : left + width] = small
    return torch.from_numpy(((canvas - MEAN) / STD).transpose(2, 0, 1)).float()


@pytest.mark.parametrize("size", [(48, 32), (33, 70), (24, 24), (32, 32), (20, 32), (500, 4)])
def test_padding_is_the_matrix_form(size: tuple[int, int]) -> None:
    image = pictures(size)[0]
    torch.testing.assert_close(pad_long_side(image, 32), padded(image, 32), atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [(48, 32), (33, 70), (24, 24), (32, 35), (39, 32), (100, 7)])
def test_cropping_is_that_of_transformers(size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil

    image = pictures(size)[0]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(centre_crop(image, 32), expected, atol=1e-6, rtol=0)


# Margins of an odd number of pixels, whose half torchvision rounds to the even one: (39 - 32) / 2 to 4, (35 - 32) / 2
# to 2, (33 - 32) / 2 to 0.
@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((48, 32), (48, 32), (8, 0)),
        ((33, 70), (32, 67), (0, 18)),
        ((24, 24), (32, 32), (0, 0)),
        ((35, 32), (35, 32), (2, 0)),
        ((32, 39), (32, 39), (0, 4)),
        ((100, 7), (457, 32), (212, 0)),
        ((64, 66), (32, 33), (0, 0)),
    ],
)
def test_bilinear_cropping_is_that_of_torchvision(
    size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = pictures(size)[0]
    pixels = by_matrices(np.asarray(image, dtype=np.float64) / 255, resized[1], resized[0], triangle)
    left, top = corner
    square = (pixels[top : top + 32, left : left + 32] - MEAN) / STD
    expected = torch.from_numpy(square.transpose(2, 0, 1)).float()
    torch.testing.assert_close(centre_crop_bilinear(image, 32), expected, atol=2e-5, rtol=0)


def test_clipscore_resizes_as_the_published_tables_where_asked(clip_folder: Path) -> None:
    images = pictures((70, 48), (33, 70), (64, 64))
    own, published = (build("clipscore", weights=clip_folder, resize=resize) for resize in ("bicubic", "bilinear"))
    assert own.identity() == build("clipscore", weights=clip_folder).identity() != published.identity()
    assert not torch.allclose(own.score(images, PROMPTS), published.score(images, PROMPTS), atol=1e-4)
    encoder = published._clip
    torch.testing.assert_close(encoder.pixels(images), torch.stack([centre_crop_bilinear(one, 32) for one in images]))
    with pytest.raises(UserError, match=r"resize = 'bilinar'; allowed: bicubic, bilinear\.? Did you mean 'bilinear'"):
        build("clipscore", weights=clip_folder, resize="bilinar")


@all_four
def test_a_batch_is_its_pictures_one_by_one(reward: Any) -> None:
    images = [*pictures(), pictures()[0].convert("L"), pictures()[1].convert("RGBA")]
    prompts = [*PROMPTS, "a cat", "a cat"]
    singly = torch.cat([reward.score([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    together = reward.score(images, prompts)
    torch.testing.assert_close(together, singly, atol=1e-4, rtol=1e-5)
    assert together.dtype == torch.float32
    assert reward.score([], []).shape == (0,)


@all_four
def test_an_unreadable_picture_is_nan_and_counted_the_others_stay(reward: Any, tmp_path: Path) -> None:
    images = pictures()
    whole = reward.score(images, PROMPTS)
    images[1] = truncated_picture(tmp_path)
    found = reward.score(images, PROMPTS)
    assert found.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]], atol=1e-4, rtol=1e-5)
    assert sum(reward.failures.values()) == 1


@all_four
def test_identity_names_weights_and_preprocessing(reward: Any) -> None:
    identity = reward.identity()
    assert len(identity["sha256"]) == 64
    assert identity["dtype"] == "float32"
    assert identity["preprocessing"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(clip_folder: Path, dtype: str) -> None:
    images = pictures()
    exact = PickScore(weights=clip_folder).score(images, PROMPTS)
    rough = PickScore(weights=clip_folder, dtype=dtype).score(images, PROMPTS)
    assert not torch.equal(exact, rough)
    # A cosine is off by about the last bit, 2^-8 or 2^-11; the factor is 99.5.
    torch.testing.assert_close(exact, rough, atol={"bfloat16": 2.0, "float16": 0.3}[dtype], rtol=0)


def test_another_dtype_is_refused(clip_folder: Path) -> None:
    with pytest.raises(UserError, match="'pickscore': dtype = 'int8'; allowed: float32, bfloat16, float16"):
        PickScore(weights=clip_folder, dtype="int8")


def test_as_many_prompts_as_pictures(clip_folder: Path) -> None:
    with pytest.raises(ValueError, match="3 images and 1 prompts"):
        ClipScore(weights=clip_folder).score(pictures(), ["one"])


def changed(state: State, change: dict[str, Tensor | None]) -> State:
    """None removes a key."""
    return {key: value for key, value in {**state, **change}.items() if value is not None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ln_final.bias": None}, "1 missing keys, the first is text_model.final_layer_norm.bias"),
        ({"extra.weight": torch.zeros(2)}, "1 unexpected keys, the first is extra.weight"),
        ({"visual.proj": torch.zeros(32, 23)}, "1 misshapen keys, the first is visual_projection.weight"),
        ({"visual.conv1.weight": None}, "there is no tensor visual.conv1.weight of 4 dimensions"),
        ({"text_projection": torch.zeros(3)}, "there is no tensor text_projection of 2 dimensions"),
        ({"visual.transformer.resblocks.1.attn.in_proj_bias": None}, "3 missing keys, the first is vision_model"),
    ],
)
def test_hpsv2_refuses_another_network(hps_folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    state = torch.load(hps_folder / "hps.pt", weights_only=True)["state_dict"]
    torch.save({"state_dict": changed(state, change)}, tmp_path / "other.pt")
    with pytest.raises(WrongWeightsError, match=said) as refusal:
        HPSv2(weights=tmp_path / "other.pt", tokenizer=hps_folder / "tokenizer.json")
    assert "\n" not in str(refusal.value)


def test_hpsv2_refuses_files_of_other_kinds(hps_folder: Path, tmp_path: Path) -> None:
    # LAION's ViT-H/14, which HPS was trained from, has the same tensors, but bare.
    torch.save(torch.load(hps_folder / "hps.pt", weights_only=True)["state_dict"], tmp_path / "laion.bin")
    (tmp_path / "damaged.pt").write_bytes((hps_folder / "hps.pt").read_bytes()[:5000])
    torch.save({"state_dict": Path("code")}, tmp_path / "pickle.pt")
    for file, said in (
        ("laion.bin", "no checkpoint of HPSv2"),
        ("damaged.pt", "no PyTorch checkpoint"),
        ("pickle.pt", "no PyTorch checkpoint of plain tensors"),
    ):
        with pytest.raises(WrongWeightsError, match=said):
            HPSv2(weights=tmp_path / file, tokenizer=hps_folder / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WrongWeightsError, match=r"is no tokenizer\.json"):
        HPSv2(weights=hps_folder / "hps.pt", tokenizer=tmp_path / "tokenizer.json")


def test_hpsv2_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_DS_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *asked: None)
    with pytest.raises(WeightsMissingError, match=r"HPS_v2_compressed\.pt from xswu/HPSv2"):
        check("hpsv2", options={"version": "v2.0"})
    with pytest.raises(UserError, match=r"version = 'v2\.2'; allowed: v2\.1, v2\.0"):
        check("hpsv2", options={"version": "v2.2"})


def test_hpsv2_cleans_prompts_as_its_tokenizer_does() -> None:
    assert clean(" \u201cit\u2019s\u201d &amp;amp; \u2018so\u2019 &lt; ") == "\"it's\" & 'so' <"


def test_an_incomplete_clip_folder_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    state = load_file(folder / "model.safetensors")
    save_file(changed(state, {"logit_scale": None}), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WrongWeightsError, match="1 missing keys, the first is logit_scale"):
        ClipScore(weights=folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(WrongWeightsError, match="is no CLIPModel"):
        ClipScore(weights=folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(WrongWeightsError, match=r"no tokenizer\.json"):
        ClipScore(weights=folder)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (head_state(20), "do not lead from 24 features to one number"),
        (changed(head_state(24), {"layers.6.bias": None}), "1 missing keys, the first is layers.6.bias"),
        (head_state(24) | {"layers.8.bias": torch.zeros(1)}, "1 unexpected keys, the first is layers.8.bias"),
        ([1.0], "not a dictionary of tensors"),
    ],
)
def test_aesthetic_refuses_another_head(clip_folder: Path, tmp_path: Path, state: Any, said: str) -> None:
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(WrongWeightsError, match=said):
        Aesthetic(weights=tmp_path / "head.pth", clip=clip_folder)


def test_missing_weights_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_DS_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *asked: None)
    for name, said in (
        ("pickscore", r"yuvalkirstain/PickScore_v1 .*3\.9 GB.*PickScore_v1"),
        ("clipscore", r"openai/clip-vit-large-patch14 .*1\.7 GB"),
        ("hpsv2", r"HPS_v2\.1_compressed\.pt from xswu/HPSv2 .*hf download xswu/HPSv2"),
        ("aesthetic", r"sac\+logos\+ava1-l14-linearMSE\.pth .*sha256 21dd590f"),
    ):
        with pytest.raises(WeightsMissingError, match=said):
            build(name)
    with pytest.raises(WeightsMissingError, match=r"nowhere does not exist; expected a transformers folder"):
        build("clipscore", weights=tmp_path / "nowhere")


def test_what_is_given_is_not_looked_for(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_DS_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *asked: None)
    check("clipscore", options={"weights": clip_folder})
    with pytest.raises(WeightsMissingError, match=r"sac\+logos"):
        check("aesthetic", options={"clip": clip_folder})


def test_a_published_file_with_another_hash_is_refused(
    clip_folder: Path, aesthetic_head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_DS_WEIGHTS", str(tmp_path))
    (tmp_path / "aesthetic").mkdir()
    shutil.copy(aesthetic_head, tmp_path / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth")
    with pytest.raises(WrongWeightsError, match=r"expected 21dd590f"):
        Aesthetic(clip=clip_folder)
