"""Which size an image has: one for all, an aspect-ratio bucket drawn for each prompt, or the prompt's own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from opd_ds.config.sections import ModelSection
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

    @classmethod
    def of(cls, family: ModelFamily, size: Size, pictures: Sequence[Picture]) -> Kind:
        return cls(size, tuple(family.fitted_size(picture.size) for picture in pictures))


class Sizes:
    """The sizes of a run.

    Args:
        default: of every image, where the settings say nothing else.
    """

    def __init__(self, settings: ModelSection, default: Size) -> None:
        self._buckets = [Size(*size) for size in settings.sizes] or [default]
        self._snapped, self._own = bool(settings.sizes), settings.size_from == "prompts"

    @classmethod
    def of_run(cls, settings: ModelSection, family: ModelFamily) -> Sizes:
        return cls(settings, Size(family.height, family.width))

    def of(self, metadata: Mapping[str, Any], number: int) -> Size:
        """The size of an image of the prompt with `metadata`; `number` draws it where the prompt has none of its own.

        Raises:
            ValueError: as `own_size`.
        """
        own = own_size(metadata) if self._own else None
        if own is None:
            return self._buckets[number % len(self._buckets)]
        return nearest_size(own, self._buckets) if self._snapped else own

    def possible(self, sets: Iterable[Sequence[Mapping[str, Any]]]) -> list[Size]:
        """All sizes that images of prompts with these metadata can have, each once; first the buckets.

        Raises:
            ValueError: as `own_size`.
        """
        found = dict.fromkeys(self._buckets)
        if self._own and not self._snapped:
            found |= dict.fromkeys(self.of(metadata, 0) for metadatas in sets for metadata in metadatas)
        return list(found)


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


def check_sizes(settings: ModelSection, family: ModelFamily, sets: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Raise UserError for a size that the family cannot draw.

    Args:
        sets: the prompts' metadata by the key of the config that names the set.
    """
    for size in settings.sizes:
        family.at(*size, key="model.sizes")
    if settings.size_from != "prompts":
        return
    for key, metadatas in sets.items():
        for number, metadata in enumerate(metadatas, 1):
            try:
                own = own_size(metadata)
            except ValueError as error:
                raise UserError(
                    f"{key}: prompt {number}: {error} (read because model.size_from = 'prompts')"
                ) from error
            if own is not None and not settings.sizes:
                hint = "; give model.sizes, and prompts get the nearest of them"
                family.at(*own, key=f"{key}: prompt {number}: height x width", hint=hint)
