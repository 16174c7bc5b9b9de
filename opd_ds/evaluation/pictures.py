"""Which images or clips an evaluation draws, and how. The one place where their noise is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from opd_ds.config.schema import RunConfig
from opd_ds.data import Kind, PromptSet, Size, Sizes, negative_prompt, shards_by
from opd_ds.diffusion import Coefficients, kernel
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.diffusion.rollout import Rows, chunks, rollout
from opd_ds.engine import Group
from opd_ds.models import Conditioning, ModelFamily
from opd_ds.rewards import Clip, Drawn
from opd_ds.utils.pictures import Picture

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


@dataclass(frozen=True)
class _Sampler:
    """Of one image size."""

    latent_shape: tuple[int, ...]
    sigmas: Tensor
    coefficients: Coefficients
    stages: tuple[int, ...]


def references(shown: Iterable[Item]) -> list[Image.Image]:
    """The first reference picture of each, where prompts have any."""
    return [item.pictures[0].load() for item in shown if item.pictures]


class Painter:
    """Draws items with any network of the family. It loads nothing before the first image.

    Attributes:
        frames: of one item; 1 of an image.
    """

    def __init__(self, config: RunConfig, family: ModelFamily, group: Group) -> None:
        self._config, self._settings = config, config.evaluation
        self._family, self._group = family, group
        self._samplers: dict[Size, _Sampler] = {}
        self._sizes = Sizes(config.model, family)
        self._shared: dict[str, Any] = {
            "steps": self._settings.steps,
            "seed": self._settings.seed,
            "negative_prompt": family.negative_prompt,
            "max_text_length": family.max_text_length,
            "precision": config.precision,
        }
        if family.vae_tiling:
            self._shared["vae_tiling"] = True
        if family.low_noise_guidance is not None:
            self._shared["low_noise_guidance"] = family.low_noise_guidance
        self.frames = 1
        if family.draws_clips and family.frames:
            self.frames = family.frames
            self._shared |= {"frames": family.frames, "fps": family.fps}

    @cached_property
    def _uncond(self) -> Conditioning:
        return self._family.encode([self._family.negative_prompt])

    def kind(self, item: Item) -> Kind:
        """Of several sizes the one that the prompt draws, and for its further images the next in turn."""
        number = sample_seed(self._settings.seed, 0, item.prompt, 0) + item.index
        return self._sizes.kind(item.metadata, item.pictures, number)

    def recipe(self, item: Item) -> dict[str, Any]:
        """What the image is drawn from, but for model and guidance."""
        negative = negative_prompt(item.metadata, self._family.negative_prompt)
        drawn = {"prompt": item.prompt, "index": item.index, "negative_prompt": negative}
        pictures: dict[str, Any] = {}
        if item.pictures:
            sha256 = [picture.sha256 for picture in item.pictures]
            pictures = {"pictures": sha256, "reference_side": self._family.reference_side}
        shape = {"latent_shape": list(self._sizes.family(self.kind(item).size).latent_shape)}
        return self._shared | shape | drawn | pictures

    @property
    def settings(self) -> dict[str, Any]:
        """What all images share, and where their sizes come from, as plain data."""
        model = self._config.model
        shape = {"latent_shape": list(self._family.latent_shape)}
        sizes = {"sizes": [list(size) for size in model.sizes], "size_from": model.size_from}
        return self._shared | (sizes if model.sizes or model.size_from != "drawn" else shape)

    def draw(self, network: Any, wanted: list[Item], guidance: float) -> Iterator[tuple[Item, Drawn, float]]:
        """This rank's part of the images or clips, each with its weight, 0 where it only pads the part; by
        micro-batches of one kind, equally many on all ranks.
        """
        world, count = self._group.drawing, len(wanted)
        kinds = [self.kind(item) for item in wanted]
        for of_ranks, shards in shards_by(range(count), kinds, world.size, count).items():
            part, size = shards[world.rank], of_ranks[world.rank].size
            family, sampler = self._sizes.family(size), self._sampler(size)
            own = [wanted[i] for i in part.indices]
            for block in chunks(len(own), _ENCODED_AT_ONCE):
                cond = self._encode(family, own[block])
                for rows in chunks(len(cond), self._settings.micro_batch):
                    drawn = self._micro_batch(network, own[block][rows], cond[rows], sampler, guidance)
                    mine = self._group.own_rows
                    weights = part.weights[block][rows][mine].tolist()
                    yield from zip(own[block][rows][mine], drawn, weights, strict=True)

    def _sampler(self, size: Size) -> _Sampler:
        if size not in self._samplers:
            family = self._sizes.family(size)
            sigmas = family.sigmas(self._settings.steps)
            table, stages = kernel("euler").coefficients(sigmas), family.stages(sigmas[:-1])
            self._samplers[size] = _Sampler(family.latent_shape, sigmas, table, stages)
        return self._samplers[size]

    def _encode(self, family: ModelFamily, wanted: list[Item]) -> Conditioning:
        pictures = [item.pictures for item in wanted]
        cond = family.encode([item.prompt for item in wanted], pictures)
        negatives = [negative_prompt(item.metadata, family.negative_prompt) for item in wanted]
        seen = family.sees_pictures and any(pictures)
        if not seen and all(text == family.negative_prompt for text in negatives):
            return cond
        return cond.with_references(cond.references, family.encode_texts(negatives, pictures))

    @torch.no_grad()
    def _micro_batch(
        self, network: Any, part: list[Item], cond: Conditioning, sampler: _Sampler, guidance: float
    ) -> Iterator[Drawn]:
        def predict(x: Tensor, sigma: Tensor, rows: Rows, step: int) -> Tensor:
            uncond, stage = self._uncond if cond.negative is None else cond.negative, sampler.stages[step]
            return self._family.guided_velocity(network, x, sigma, cond, uncond, guidance, stage)

        self._group.progress("drawing images")
        noise = SampleNoise([item.seed(self._settings.seed) for item in part], sampler.latent_shape)
        drawn = rollout(predict, noise, sampler.coefficients, sampler.sigmas, device=self._group.device)
        final = drawn.final[self._group.own_rows]
        return (to_drawn(one, self._family.fps) for one in (self._family.decode(final) if len(final) else ()))


def to_drawn(decoded: Tensor, fps: float) -> Drawn:
    """[3, H, W] in [0, 1] to an image, [F, 3, H, W] to a clip."""
    return to_image(decoded) if decoded.ndim == 3 else Clip(tuple(map(to_image, decoded)), fps)


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] to an 8-bit RGB image."""
    array = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array)
