"""hpsv2x 1.2.0. Run inside the environment of requirements/hpsv2x.txt only."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_MODEL = "ViT-H-14"


def random_weights(path: str) -> None:
    """A checkpoint as published (`state_dict` in half precision), and beside it CLIP's tokenizer.json."""
    import torch

    torch.manual_seed(0)
    model, _ = _model()
    torch.save({"state_dict": {key: value.half() for key, value in model.state_dict().items()}}, path)
    Path(path).with_name("tokenizer.json").write_text(json.dumps(_tokenizer()), encoding="utf-8")


def load(weights: str) -> Callable[[list[Image.Image], list[str], list[dict[str, Any]]], dict[str, np.ndarray]]:
    """To `score` [B], `pixels` [B, 3, 224, 224] and `tokens` [B, 77].

    These are the lines of hpsv2's own `score`, which would fetch LAION's weights first, only to overwrite them, and
    read the checkpoint again at every call. In float32, as there on the CPU.
    """
    import torch
    from hpsv2.src.open_clip import get_tokenizer  # type: ignore[import-not-found,unused-ignore]

    model, preprocess = _model()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["state_dict"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    tokenizer = get_tokenizer(_MODEL)

    @torch.no_grad()
    def run(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        pixels = [preprocess(image) for image in images]
        tokens = tokenizer(prompts)
        scores = []
        for picture, text in zip(pixels, tokens, strict=True):
            output = model(picture[None].to(device), text[None].to(device))
            scores.append((output["image_features"] @ output["text_features"].T)[0, 0].item())
        return {"score": np.array(scores), "pixels": torch.stack(pixels).numpy(), "tokens": tokens.numpy()}

    return run


def _model() -> tuple[Any, Any]:
    """The network with hpsv2's settings, and its preprocessing."""
    from hpsv2.src.open_clip import create_model_and_transforms  # type: ignore[import-not-found,unused-ignore]

    model, _, preprocess = create_model_and_transforms(_MODEL, None, light_augmentation=True, output_dict=True)
    return model, preprocess


def _tokenizer() -> dict[str, Any]:
    """The BPE vocabulary that hpsv2x carries, in the form of openai/clip-vit-large-patch14's tokenizer.json."""
    from hpsv2.src.open_clip import tokenizer  # type: ignore[import-not-found,unused-ignore]

    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = tokenizer.SimpleTokenizer()
    vocabulary = dict(bpe.encoder)
    vocabulary[start], vocabulary[end] = vocabulary.pop("<start_of_text>"), vocabulary.pop("<end_of_text>")
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    with gzip.open(tokenizer.default_bpe(), "rt", encoding="utf-8") as stream:
        merges = stream.read().split("\n")[1 : len(bpe.bpe_ranks) + 1]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[token], "content": token, **special} for token in (start, end)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [end, vocabulary[end]],
            "cls": [start, vocabulary[start]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": end,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
