"""Which size an image has: one for all, an aspect-ratio bucket drawn for each prompt, or the prompt's own: that of its
columns, or of its reference picture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from opd_ds.config.sections import ModelSection
from opd_ds.data.prompt_set import PromptSet
from opd_ds.errors import UserError, shown
from opd_ds.models import ModelFamily
from opd_ds.utils.pictures import Picture


class Size(NamedTuple):
    """In pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class Kind(NamedTuple):
    """Samples of one kind can be in one forward.

    Attributes:
        size: of the image.
        pictures: (width, height) in pixels to which each of the prompt's reference pictures is resized.
    """

    size: Size
    pictures: tuple[tuple[int, int], ...] = ()


class Sizes:
    """The sizes of a run."""

    def __init__(self, settings: ModelSection, family: ModelFamily) -> None:
        self._buckets = [Size(*size) for size in settings.sizes] or [Size(family.height, family.width)]
        self._snapped, self._from = bool(settings.sizes), settings.size_from
        self._family, self._families = family, dict[Size, ModelFamily]()

    def family(self, size: Size) -> ModelFamily:
        """The family at one of the sizes."""
        if size not in self._families:
            self._families[size] = self._family.at(*size)
        return self._families[size]

    def kind(self, metadata: Mapping[str, Any], pictures: Sequence[Picture], number: int) -> Kind:
        """As `of`, with the sizes to which the pictures are resized for such an image."""
        size = self.of(metadata, pictures, number)
        return Kind(size, tuple(self.family(size).fitted_size(picture.size) for picture in pictures))

    def of(self, metadata: Mapping[str, Any], pictures: Sequence[Picture], number: int) -> Size:
        """The size of an image of the prompt with `metadata` and reference `pictures`; `number` draws it where the
        prompt has none of its own.

        Raises:
            ValueError: as `own_size`.
        """
        own = self._own(metadata, pictures)
        if own is None:
            return self._buckets[number % len(self._buckets)]
        return nearest_size(own, self._buckets) if self._snapped else own

    def each(self, metadata: Mapping[str, Any], pictures: Sequence[Picture]) -> list[Size]:
        """All that images of this prompt can have."""
        return list({self.of(metadata, pictures, number): None for number in range(len(self._buckets))})

    def possible(self, sets: Iterable[PromptSet]) -> list[Size]:
        """All sizes that images of these prompts can have, each once; first the buckets.

        Raises:
            ValueError: as `own_size`.
        """
        found = dict.fromkeys(self._buckets)
        if self._from != "drawn" and not self._snapped:
            found |= {self.of(prompts.metadata[row], prompts.pictures_of(row), 0): None
                      for prompts in sets for row in range(len(prompts))}  # fmt: skip
        return list(found)

    def _own(self, metadata: Mapping[str, Any], pictures: Sequence[Picture]) -> Size | None:
        if self._from == "prompts":
            return own_size(metadata)
        if self._from == "drawn" or not pictures:
            return None
        # Of several the last one, as the pipelines of Qwen-Image-Edit-Plus and FLUX.2 in diffusers 0.42.1.
        width, height = pictures[-1].size if self._snapped else self._family.fitted_size(pictures[-1].size)
        return Size(height, width)


def own_size(metadata: Mapping[str, Any]) -> Size | None:
    """What `height` and `width` beside a prompt say; None where both are missing or null.

    Raises:
        ValueError: one of them without the other, or no whole number above 0.
    """
    height, width = metadata.get("height"), metadata.get("width")
    return None if height is None and width is None else Size(_pixels("height", height), _pixels("width", width))


def _pixels(key: str, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]+", value.strip()):  # as .csv files have them
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} = {shown(value)}: allowed are whole numbers of pixels; height and width go together")
    return value


def nearest_size(wanted: Size, buckets: Sequence[Size]) -> Size:
    """The bucket of the nearest aspect ratio; of several of one ratio that of the nearest area."""

    def distance(bucket: Size) -> tuple[float, float]:
        ratio = math.log(bucket.width / bucket.height) - math.log(wanted.width / wanted.height)
        area = math.log(bucket.width * bucket.height) - math.log(wanted.width * wanted.height)
        return round(abs(ratio), 9), abs(area)

    return min(buckets, key=distance)


def check_sizes(settings: ModelSection, family: ModelFamily, sets: Mapping[str, PromptSet]) -> None:
    """Raise UserError for a size that the family cannot draw.

    Args:
        sets: by the key of the config that names the set.
    """
    for size in settings.sizes:
        family.at(*size, key="model.sizes")
    if settings.size_from == "pictures":
        _check_pictures(settings, family, sets)
    if settings.size_from != "prompts":
        return
    for key, prompts in sets.items():
        for number, metadata in enumerate(prompts.metadata, 1):
            try:
                own = own_size(metadata)
            except ValueError as error:
                raise UserError(
                    f"{key}: prompt {number}: {error} (read because model.size_from = 'prompts')"
                ) from error
            if own is not None and not settings.sizes:
                hint = "; give model.sizes, and prompts get the nearest of them"
                family.at(*own, key=f"{key}: prompt {number}: height x width", hint=hint)


def _check_pictures(settings: ModelSection, family: ModelFamily, sets: Mapping[str, PromptSet]) -> None:
    said = "model.size_from = 'pictures'"
    if not family.takes_pictures:
        raise UserError(f"{said}: model.family = {settings.family!r} takes no reference pictures; remove it")
    if settings.sizes:
        return
    if family.fits_pictures_to_image:
        raise UserError(
            f"{said}: {settings.family!r} resizes pictures to the size that is drawn; give model.sizes, and prompts "
            "get the nearest in proportions"
        )
    for key, prompts in sets.items():
        for number, pictures in enumerate(prompts.pictures, 1):
            if pictures:
                width, height = family.fitted_size(pictures[-1].size)
                hint = "; give model.sizes, and prompts get the nearest in proportions"
                family.at(height, width, key=f"{key}: prompt {number}: the picture, fitted,", hint=hint)
