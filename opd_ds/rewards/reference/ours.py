"""Our scorers' side of the comparison: the arrays that the adapter of the same name gives, from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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


# A new comparison is one function and one line here.
OURS: dict[str, Ours] = {"hpsv2x": hpsv2x, "image-reward": image_reward}
