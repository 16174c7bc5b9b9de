"""ImageReward: small random weights in the published layout, BLIP's arithmetic written out again here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from opd_ds.errors import UserError
from opd_ds.rewards import WeightsMissingError, WrongWeightsError, build
from opd_ds.rewards.imagereward import ImageReward
from tests.rewards.blip_state import PATCH, SIZE, WORDS, random_state
from tests.rewards.clip_world import MEAN, PROMPTS, STD, State, pictures, truncated_picture


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(random_state(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return {"weights": folder / "ImageReward.pt", "vocabulary": folder / "vocab.txt"}


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """[B, T, D], [B, S, D] twice; mask [B, S], 1 where there is something."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def expected(state: State, pixels: Tensor, ids: Tensor) -> Tensor:
    """BLIP's pre-norm ViT, its post-norm BERT with cross-attention, the head on the first token."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    name = "blip.visual_encoder"
    kernel, bias = (state[f"{name}.patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
    x = F.conv2d(pixels, kernel, bias, stride=PATCH).flatten(2).mT
    x = torch.cat([state[f"{name}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{name}.pos_embed"]
    for layer in range(2):
        block = f"{name}.blocks.{layer}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(*qkv, heads=16))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{name}.norm", x, 1e-6)

    name = "blip.text_encoder"
    x = state[f"{name}.embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{name}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(f"{name}.embeddings.LayerNorm", x, 1e-12)
    for layer in range(2):
        block = f"{name}.encoder.layer.{layer}"
        for attention, source, mask in (("attention", None, ids != 0), ("crossattention", seen, None)):
            own = f"{block}.{attention}"
            kv = x if source is None else source
            parts = linear(f"{own}.self.query", x), linear(f"{own}.self.key", kv), linear(f"{own}.self.value", kv)
            read = attend(*parts, heads=12, mask=mask)
            x = norm(f"{own}.output.LayerNorm", x + linear(f"{own}.output.dense", read), 1e-12)
        hidden = F.gelu(linear(f"{block}.intermediate.dense", x))
        x = norm(f"{block}.output.LayerNorm", x + linear(f"{block}.output.dense", hidden), 1e-12)
    x = x[:, 0]
    for layer in (0, 2, 4, 6, 7):
        x = linear(f"mlp.layers.{layer}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def cropped(image: Image.Image) -> Tensor:
    """By hand: the short side to SIZE by Pillow, the middle as torchvision finds it."""
    scale = SIZE / min(image.size)
    width, height = (int(side * scale + 1e-9) for side in image.size)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    square = pixels[top : top + SIZE, left : left + SIZE]
    return torch.from_numpy(((square - MEAN) / STD).transpose(2, 0, 1)).float()


def test_the_score_is_blips(files: dict[str, Path]) -> None:
    # 35 - 32 = 3: half of it is 2 here, 1 where it is rounded down.
    images = [*pictures((35, 32), (33, 70), (24, 24)), pictures()[0]]
    prompts = ["a red cat", "Two cats, a dog", "", "bench " * 50]
    ids = torch.zeros(4, 35, dtype=torch.long)
    ids[0, :5] = torch.tensor([2, 4, 5, 6, 3])
    ids[1, :8] = torch.tensor([2, 9, 6, 7, 8, 4, 10, 3])
    ids[2, :2] = torch.tensor([2, 3])
    ids[3] = torch.tensor([2, *[11] * 33, 3])
    reward = ImageReward(**files)
    assert torch.equal(reward.tokens(prompts)[0], ids)
    wanted = expected(random_state(), torch.stack([cropped(image) for image in images]), ids)
    assert wanted.std() > 0.1
    torch.testing.assert_close(reward.score(images, prompts), wanted, atol=1e-5, rtol=1e-5)


def test_a_batch_is_its_pictures_one_by_one(files: dict[str, Path]) -> None:
    reward = ImageReward(**files, batch_size=2)
    singly = torch.cat([reward.score([image], [prompt]) for image, prompt in zip(pictures(), PROMPTS, strict=True)])
    torch.testing.assert_close(reward.score(pictures(), PROMPTS), singly, atol=1e-5, rtol=1e-5)
    assert reward.score([], []).shape == (0,)


def test_an_unreadable_picture_is_nan_and_counted(files: dict[str, Path], tmp_path: Path) -> None:
    reward = ImageReward(**files)
    found = reward.score([truncated_picture(tmp_path), pictures()[1]], PROMPTS[:2])
    assert found.isnan().tolist() == [True, False]
    assert sum(reward.failures.values()) == 1


def test_half_precision(files: dict[str, Path]) -> None:
    exact = ImageReward(**files).score(pictures(), PROMPTS)
    rough = ImageReward(**files, dtype="bfloat16").score(pictures(), PROMPTS)
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, atol=0.15, rtol=0)
    with pytest.raises(UserError, match="'imagereward': dtype = 'float16'; allowed: float32, bfloat16"):
        ImageReward(**files, dtype="float16")


def without(key: str) -> State:
    state = random_state()
    del state[key]
    return state


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            without("blip.visual_encoder.blocks.1.norm1.bias"),
            "1 missing keys, the first is encoder.layers.1.layer_norm1",
        ),
        (without("blip.text_encoder.encoder.layer.0.crossattention.self.key.bias"), "1 missing keys, .*crossattention"),
        (without("mlp.layers.7.weight"), r"mlp\. is no such head: 1 missing keys, the first is layers\.7\.weight"),
        (without("blip.visual_encoder.pos_embed"), r"there is no tensor blip\.visual_encoder\.pos_embed"),
        (random_state() | {"blip.itm_head.weight": torch.zeros(1)}, r"1 unexpected keys, .* blip\.itm_head\.weight"),
        (random_state() | {"blip.text_encoder.pooler.bias": torch.zeros(1)}, "1 unexpected keys, .* pooler.bias"),
        ({"state_dict": random_state()}, "1 unexpected keys, the first is state_dict"),
    ],
)
def test_another_network_is_refused(files: dict[str, Path], tmp_path: Path, state: Any, said: str) -> None:
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(WrongWeightsError, match=said):
        ImageReward(weights=tmp_path / "other.pt", vocabulary=files["vocabulary"])


def test_another_vocabulary_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("just\nwords")
    with pytest.raises(WrongWeightsError, match="no vocabulary of BERT"):
        ImageReward(weights=files["weights"], vocabulary=tmp_path / "vocab.txt")


def test_missing_weights_are_named(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_DS_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *asked: None)
    with pytest.raises(WeightsMissingError, match=r"'imagereward': .*ImageReward\.pt from THUDM/ImageReward \(1\.8 GB"):
        build("imagereward")
    with pytest.raises(WeightsMissingError, match=r"vocab\.txt from google-bert/bert-base-uncased .*07eced375cec"):
        build("imagereward", weights=files["weights"])
