"""What a run encodes: its prompts and reference pictures, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import ModelSection
from opd_ds.data import PromptSet, Sizes, negative_prompt
from opd_ds.data.text_cache import TextCache, encoders_identity
from opd_ds.errors import UserError, about
from opd_ds.models import ModelFamily
from opd_ds.utils.pictures import Picture


@dataclass(frozen=True)
class Wanted:
    """All that is encoded, each once, by the name under which a text cache keeps it.

    Attributes:
        texts: prompts, and the pictures that the text encoder sees beside them.
        pictures: each with the family at the size of an image that is drawn with it.
    """

    texts: dict[str, tuple[str, tuple[Picture, ...]]]
    pictures: dict[str, tuple[Picture, ModelFamily]]

    @classmethod
    def of(cls, settings: ModelSection, family: ModelFamily, sets: Iterable[PromptSet]) -> Wanted:
        """The negative prompt and all of `sets`."""
        negative, sizes = family.negative_prompt, Sizes(settings, family)
        texts: dict[str, tuple[str, tuple[Picture, ...]]] = {negative: (negative, ())}
        pictures: dict[str, tuple[Picture, ModelFamily]] = {}
        for found in sets:
            for row, prompt in enumerate(found.prompts):
                own = found.pictures_of(row)
                for at in map(sizes.family, sizes.each(found.metadata[row], own) if own else ()):
                    pictures |= {at.picture_name(picture): (picture, at) for picture in own}
                seen = own if family.sees_pictures else ()
                asked = (prompt, negative_prompt(found.metadata[row], negative))
                texts |= {family.text_name(text, seen): (text, seen) for text in asked}
        return cls(texts, pictures)


def check_text_cache(config: RunConfig, family: ModelFamily, sets: Iterable[PromptSet]) -> None:
    """Raise UserError when a run would read encodings that are not there, or not of its encoders."""
    if config.model.text_encoders == "cached":
        wanted = Wanted.of(config.model, family, sets)
        cache = TextCache(config.text_cache)
        cache.check(encoders_identity(config, family.path), [*wanted.texts, *wanted.pictures])


def check_pictures(config: RunConfig, family: ModelFamily, sets: Mapping[str, PromptSet], *, decode: bool) -> None:
    """Raise UserError for reference pictures that the model does not take.

    Args:
        sets: by key of the config, for messages.
        decode: each of them, to find those that are cut off.
    """
    for key, found in sets.items():
        if family.needs_pictures and (lacking := [row for row in range(len(found)) if not found.pictures_of(row)]):
            raise UserError(
                f"{key}: {len(lacking)} of {len(found)} prompts have no picture, the first: "
                f"{found.prompts[lacking[0]]!r}; model.family = {config.model.family!r} needs one "
                f"for each: say where they stand with {key}.pictures"
            )
        with about(key):
            for own in found.pictures:
                _check_prompt(config.model.family, family, own)
            if decode:
                with ThreadPoolExecutor() as threads:  # Pillow decodes without the interpreter's lock
                    for _ in threads.map(_decode, {picture for own in found.pictures for picture in own}):
                        pass


def _check_prompt(name: str, family: ModelFamily, pictures: tuple[Picture, ...]) -> None:
    if len(pictures) > family.takes_pictures:
        most = f"at most {family.takes_pictures} of a prompt" if family.takes_pictures else "none"
        raise UserError(
            f"{pictures[0].row} has {len(pictures)} reference pictures, and model.family = {name!r} takes {most}; "
            "docs/families.md says which families edit pictures"
        )
    for picture in pictures:
        if flaw := family.flaw_of(picture):
            raise UserError(f"{picture.row}: {picture.name}: {flaw}")


def _decode(picture: Picture) -> None:
    picture.load()
