"""What each reward can be built from without its published weights; for tests and `python -m benchmarks reward-table`.

Rewards with weights get small random ones of the true architecture, written the way the published files are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.rewards import blip_state, mmdet_layout
from tests.rewards.clip_world import head_state, open_clip_state, write_clip_folder, write_clip_tokenizer
from tests.rewards.servers import Answer, answering

Options = dict[str, Any]

_servers = ExitStack()  # left running until the process ends


def _served(answer: Answer) -> str:
    return _servers.enter_context(answering(answer))


def _unifiedreward(folder: Path) -> Options:
    def answer(handler: Any, body: bytes) -> tuple[int, bytes]:
        if handler.path == "/v1/models":
            return 200, b'{"object": "list", "data": [{"id": "tiny", "object": "model"}]}'
        choice = {"index": 0, "message": {"role": "assistant", "content": "Final Score: 3"}, "finish_reason": "stop"}
        return 200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()

    return {"base_url": f"{_served(answer)}/v1", "model": "tiny"}


def _remote(folder: Path) -> Options:
    def answer(handler: Any, body: bytes) -> tuple[int, bytes]:
        if handler.path == "/score":
            return 200, json.dumps({"scores": [0.5] * len(json.loads(body)["images"])}).encode()
        return 200, b'{"name": "tiny", "identity": {}}'

    return {"url": _served(answer)}


def _nothing(folder: Path) -> Options:
    return {}


# Rewards that read no weights of their own: options by folder.
WITHOUT_WEIGHTS: dict[str, Callable[[Path], Options]] = {
    "ocr": _nothing,
    "unifiedreward": _unifiedreward,
    "jpeg_compressibility": _nothing,
    "jpeg_incompressibility": _nothing,
    "mix": lambda folder: {"parts": {"jpeg_compressibility": 1, "miniature_look": 100}},
    "remote": _remote,
    "miniature_text": _nothing,
    "miniature_composition": _nothing,
    "miniature_look": _nothing,
    "miniature_all": _nothing,
    "miniature_edit": _nothing,
}


def _saved(state: dict[str, torch.Tensor], file: Path, spoilt: bool, *, under: str | None = None) -> Path:
    """`state`, or all of it but one tensor, as torch.save writes it; below the key `under` where one is given."""
    kept = dict(list(state.items())[1:]) if spoilt else state
    torch.save({under: kept} if under else kept, file)
    return file


def _clip(folder: Path, spoilt: bool = False) -> Path:
    clip = write_clip_folder(folder)
    if spoilt:
        state = load_file(clip / "model.safetensors")
        del state["visual_projection.weight"]
        save_file(state, clip / "model.safetensors", metadata={"format": "pt"})
    return clip


def _hpsv2(folder: Path, spoilt: bool) -> Options:
    vocabulary = write_clip_tokenizer(folder)
    state = open_clip_state(len(vocabulary))
    weights = _saved(state, folder / "hps.pt", spoilt, under="state_dict")
    return {"weights": str(weights), "tokenizer": str(folder / "tokenizer.json")}


def _aesthetic(folder: Path, spoilt: bool) -> Options:
    weights = _saved(head_state(24), folder / "head.pth", spoilt)
    return {"weights": str(weights), "clip": str(_clip(folder / "clip"))}


def _imagereward(folder: Path, spoilt: bool) -> Options:
    (folder / "vocab.txt").write_text("\n".join(blip_state.WORDS))
    weights = _saved(blip_state.random_state(), folder / "ImageReward.pt", spoilt)
    return {"weights": str(weights), "vocabulary": str(folder / "vocab.txt")}


def _geneval(folder: Path, spoilt: bool) -> Options:
    weights = _saved(mmdet_layout.state(), folder / "mask2former.pth", spoilt, under="state_dict")
    return {"weights": str(weights), "clip_weights": str(_clip(folder / "clip"))}


def _dino(folder: Path, spoilt: bool) -> Options:
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    torch.manual_seed(7)
    model = Dinov2Model(Dinov2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, all images would look alike
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if spoilt:
        state = load_file(folder / "model.safetensors")
        del state["layernorm.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return {"weights": str(folder)}


def _lpips(folder: Path, spoilt: bool) -> Options:
    from torchvision.models import alexnet

    return {"weights": str(_saved(alexnet(weights=None).state_dict(), folder / "alexnet.pth", spoilt))}


# Rewards with weights: options by folder, and whether a tensor is to be missing from the file.
WITH_WEIGHTS: dict[str, Callable[[Path, bool], Options]] = {
    "pickscore": lambda folder, spoilt: {"weights": str(_clip(folder, spoilt))},
    "clipscore": lambda folder, spoilt: {"weights": str(_clip(folder, spoilt))},
    "clip_direction": lambda folder, spoilt: {"weights": str(_clip(folder, spoilt))},
    "dino": _dino,
    "lpips": _lpips,
    "hpsv2": _hpsv2,
    "aesthetic": _aesthetic,
    "imagereward": _imagereward,
    "geneval": _geneval,
}


def make(name: str, folder: Path, *, spoilt: bool = False) -> Options:
    """Options for `build(name, ...)`, its files written below `folder`; `spoilt` leaves one tensor out."""
    folder.mkdir(parents=True, exist_ok=True)
    if name in WITH_WEIGHTS:
        return WITH_WEIGHTS[name](folder, spoilt)
    return WITHOUT_WEIGHTS[name](folder)
