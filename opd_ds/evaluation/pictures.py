"""Which images or clips an evaluation draws, and how. The one place where their noise is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from opd_ds.config.schema import RunConfig
from opd_ds.data import PromptSet
from opd_ds.diffusion import kernel
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.diffusion.rollout import Rows, chunks, rollout
from opd_ds.engine import Group
from opd_ds.models import Conditioning, ModelFamily
from opd_ds.pictures import Picture
from opd_ds.rewards import Clip, Drawn

_ENCODED_AT_ONCE = 256  # prompts per trip of offloaded text encoders; SD3's embeddings are some 3 MB each


@dataclass(frozen=True)
class Item:
    """One image to draw.

    Attributes:
        number: the prompt's place in its set.
        sample: which of the prompt's images.
        index: which of all images of this text: a set may hold a text twice, and both want noise of their own.
        pictures: the prompt's reference pictures.
    """

    number: int
    sample: int
    prompt: str
    metadata: dict[str, Any]
    index: int
    pictures: tuple[Picture, ...] = ()

    def seed(self, seed: int) -> int:
        """Names the noise by (prompt, index) alone: the same for every model, set, rank and number of samples."""
        return sample_seed(seed, 0, f"evaluation/{self.prompt}", self.index)


def items(prompts: PromptSet, samples: int, limit: int | None = None) -> list[Item]:
    """All first images in prompt order, then all second ones, and so on; `limit` keeps the first prompts.

    More samples or another limit add or remove images and change none.
    """
    multiplicity, seen, occurrence = Counter(prompts.prompts), Counter[str](), []
    for prompt in prompts.prompts:
        occurrence.append(seen[prompt])
        seen[prompt] += 1
    count = len(prompts) if limit is None else min(limit, len(prompts))
    return [
        Item(
            number,
            sample,
            prompt,
            prompts.metadata[number],
            occurrence[number] + sample * multiplicity[prompt],
            prompts.pictures_of(number),
        )
        for sample in range(samples)
        for number, prompt in enumerate(prompts.prompts[:count])
    ]


class Painter:
    """Draws items with any network of the family. It loads nothing before the first image.

    Attributes:
        settings: what all images share, as plain data.
        frames: of one item; 1 of an image.
    """

    def __init__(self, config: RunConfig, family: ModelFamily, group: Group) -> None:
        self._settings = config.evaluation
        self._family, self._group = family, group
        self._sigmas = family.sigmas(self._settings.steps)
        self._stages = family.stages(self._sigmas[:-1])
        self._table = kernel("euler").coefficients(self._sigmas)
        self.settings: dict[str, Any] = {
            "steps": self._settings.steps,
            "seed": self._settings.seed,
            "negative_prompt": family.negative_prompt,
            "latent_shape": list(family.latent_shape),
            "max_text_length": family.max_text_length,
            "precision": config.precision,
        }
        if family.vae_tiling:
            self.settings["vae_tiling"] = True
        if family.low_noise_guidance is not None:
            self.settings["low_noise_guidance"] = family.low_noise_guidance
        self.frames = 1
        if family.draws_clips and family.frames:
            self.frames = family.frames
            self.settings |= {"frames": family.frames, "fps": family.fps}

    @cached_property
    def _uncond(self) -> Conditioning:
        return self._family.encode([self._family.negative_prompt])

    def draw(self, network: Any, wanted: list[Item], guidance: float) -> Iterator[tuple[Item, Drawn]]:
        """The images or clips in order, by micro-batches. The number of forwards depends on `len(wanted)` alone."""
        for block in chunks(len(wanted), _ENCODED_AT_ONCE):
            cond = self._encode(wanted[block])
            for rows in chunks(len(cond), self._settings.micro_batch):
                part = wanted[block][rows]
                yield from zip(part, self._micro_batch(network, part, cond[rows], guidance), strict=True)

    def _encode(self, wanted: list[Item]) -> Conditioning:
        pictures = [item.pictures for item in wanted]
        cond = self._family.encode([item.prompt for item in wanted], pictures)
        if not (self._family.sees_pictures and any(pictures)):
            return cond
        return cond.with_references(
            cond.references, self._family.encode_texts([self._family.negative_prompt] * len(cond), pictures)
        )

    @torch.no_grad()
    def _micro_batch(self, network: Any, part: list[Item], cond: Conditioning, guidance: float) -> Iterator[Drawn]:
        def predict(x: Tensor, sigma: Tensor, rows: Rows, step: int) -> Tensor:
            uncond, stage = self._uncond if cond.negative is None else cond.negative, self._stages[step]
            return self._family.guided_velocity(network, x, sigma, cond, uncond, guidance, stage)

        self._group.progress("drawing images")
        noise = SampleNoise([item.seed(self._settings.seed) for item in part], self._family.latent_shape)
        drawn = rollout(predict, noise, self._table, self._sigmas, device=self._group.device)
        return (to_drawn(one, self._family.fps) for one in self._family.decode(drawn.final))


def to_drawn(decoded: Tensor, fps: float) -> Drawn:
    """[3, H, W] in [0, 1] to an image, [F, 3, H, W] to a clip."""
    return to_image(decoded) if decoded.ndim == 3 else Clip(tuple(map(to_image, decoded)), fps)


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] to an 8-bit RGB image."""
    array = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array)
