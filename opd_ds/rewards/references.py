"""Reference pictures beside what was drawn from them, for rewards that say that they take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from opd_ds.rewards.base import Metadata, Reward

if TYPE_CHECKING:  # as in base.py
    from PIL import Image
    from torch import Tensor

    from opd_ds.utils.pictures import Picture

# Of one image or clip, in the order of the prompt's columns; none of a prompt without.
Own: TypeAlias = "tuple[Image.Image, ...]"
References: TypeAlias = Sequence[Own]

WITHOUT = "prompt without a reference picture"  # a `Result` of an image
MOST_PIXELS = 1024 * 1024  # about what families encode; a photo of a camera has twenty times as many


def takes_references(reward: object) -> bool:
    """Whether the reward (or the class or function of one) says so; without a word it gets none."""
    return bool(getattr(reward, "takes_references", False))


def score_with(
    reward: Reward,
    drawn: Sequence[Any],
    prompts: list[str],
    metadata: Metadata | None,
    references: References | None,
) -> Tensor:
    """`reward.score` of images or clips; the references are its fourth argument where the reward takes them."""
    score: Any = reward.score
    found: Tensor = score(drawn, prompts, metadata, *((references,) if takes_references(reward) else ()))
    return found


def score_beside(
    reward: Reward,
    drawn: Sequence[Any],
    prompts: list[str],
    metadata: Metadata | None,
    pictures: Sequence[tuple[Picture, ...]],
) -> Tensor:
    """The same of pictures that are not loaded yet: each is loaded once, and only where the reward takes references.

    Raises:
        UserError: a picture is not what was found any more.
    """
    if not takes_references(reward):
        return reward.score(list(drawn), prompts, metadata)
    loaded = {picture: at_most(picture.load()) for picture in dict.fromkeys(one for own in pictures for one in own)}
    return score_with(reward, drawn, prompts, metadata, [tuple(loaded[one] for one in own) for own in pictures])


def at_most(image: Image.Image, pixels: int = MOST_PIXELS) -> Image.Image:
    """The image, or a smaller copy with the same proportions of no more than `pixels`."""
    from PIL import Image

    shrink = (pixels / (image.width * image.height)) ** 0.5
    if shrink >= 1:
        return image
    size = max(1, int(image.width * shrink)), max(1, int(image.height * shrink))
    return image.resize(size, Image.Resampling.LANCZOS)
