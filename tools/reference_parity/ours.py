"""Our scorers' side of the comparison: the arrays that the adapter of the same name gives, from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opd_ds.rewards.geneval import pipeline
from opd_ds.rewards.geneval.detector import Detector
from opd_ds.rewards.hpsv2 import HPSv2, clean
from opd_ds.rewards.imagereward import ImageReward

Arrays = dict[str, np.ndarray]
Ours = Callable[[Path, list[Image.Image], list[str], list[dict[str, Any]]], Arrays]


def hpsv2x(weights: Path, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> Arrays:
    tokenizer = weights.with_name("tokenizer.json")
    reward = HPSv2(weights=weights, tokenizer=tokenizer if tokenizer.is_file() else None)
    return {
        "score": reward.score(images, prompts).numpy(),
        "pixels": reward.clip.pixels(images).numpy(),
        "tokens": reward.clip.tokens([clean(prompt) for prompt in prompts]).numpy(),
    }


def image_reward(
    weights: Path, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]
) -> Arrays:
    vocabulary = weights.with_name("vocab.txt")
    reward = ImageReward(weights=weights, vocabulary=vocabulary if vocabulary.is_file() else None)
    return {
        "score": reward.score(images, prompts).numpy(),
        "pixels": reward.pixels(images).numpy(),
        "tokens": reward.tokens(prompts)[0].numpy(),
    }


def mmdet(weights: Path, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> Arrays:
    detector = Detector(weights)
    arrays: Arrays = {}
    for i, image in enumerate(images[:2]):
        prepared = pipeline.prepare(image)
        classes, masks = (logits[0] for logits in detector.logits(prepared.pixels[None]))
        found = pipeline.instances(classes, masks, prepared)
        best = found.scores.argsort(descending=True)
        tensors = {
            "pixels": prepared.pixels,
            "class_logits": classes,
            "mask_logits": masks,
            "scores": found.scores[best],
            "labels": found.labels[best],
            "boxes": found.boxes[best],
            "areas": found.masks[best].sum((1, 2)),
        }
        arrays |= {f"{name}_{i}": tensor.numpy() for name, tensor in tensors.items()}
    return arrays


# A new comparison is one function and one line here.
OURS: dict[str, Ours] = {"hpsv2x": hpsv2x, "image-reward": image_reward, "mmdet": mmdet}
