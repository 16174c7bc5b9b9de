"""Prompts that ask for a text in the image, in quotes, as the reward `ocr` searches it."""

from __future__ import annotations

from collections.abc import Set
from random import Random

from opd_ds.data.generators.drawing import digits, shuffled
from opd_ds.errors import UserError

_SCENES = (
    "A wooden shop sign over a narrow street that reads {}",
    "A chalkboard on an easel with {} written in white chalk",
    "A birthday cake with {} in blue icing",
    "A concert poster on a brick wall, its headline {}",
    "The cover of an old book titled {}",
    "A neon sign in a dark window glowing {}",
    "A paper cup on a desk with {} printed on its side",
    "A road sign in the desert that says {}",
    "A banner across a stadium with the words {}",
    "A knitted sweater with {} across the chest",
    "A brass plate beside a door engraved with {}",
    "A train departing under a display that shows {}",
    "A sailing boat with the name {} painted on its bow",
    "A stone gate with {} carved above the arch",
    "A jam jar whose handwritten label says {}",
    "A postcard of a harbour with {} in large letters",
    "A delivery van with {} lettered on its door",
    "A mural of bright letters that spell {}",
    "A market stall under an awning that reads {}",
    "A computer screen showing the line {}",
    "A theatre entrance with {} on the lit board",
    "A hot-air balloon with {} around its middle",
    "A tin box with {} stamped into the lid",
    "A rubber stamp that has just printed {}",
)
_MANNERS = (
    "in morning light",
    "on a rainy evening",
    "seen from close up",
    "seen from a low angle",
    "as a watercolour",
    "as a flat illustration",
    "as a black and white photograph",
    "against a plain background",
    "with people passing by",
    "in soft focus at the edges",
)
_QUALITIES = (
    "Amber", "Brave", "Calm", "Distant", "Early", "Fresh", "Golden", "Hidden", "Iron", "Jolly", "Kind", "Little",
    "Mighty", "Northern", "Open", "Proud", "Quiet", "Royal", "Silver", "Tidy", "Upper", "Velvet", "Warm", "Young",
)  # fmt: skip
_THINGS = (
    "Anchor", "Bakery", "Circus", "Dragon", "Engine", "Forest", "Garden", "Harbour", "Island", "Journey", "Kitchen",
    "Lantern", "Market", "Night", "Orchard", "Parade", "Quarry", "River", "Station", "Tower", "Union", "Valley",
    "Winter", "Yard",
)  # fmt: skip
_DEEDS = (
    "Ask", "Bring", "Cross", "Draw", "Enter", "Follow", "Guard", "Help", "Imagine", "Join", "Keep", "Light", "Meet",
    "Name", "Open", "Paint", "Quit", "Remember", "Save", "Trust", "Use", "Visit", "Wake", "Find",
)  # fmt: skip
_NUMBERS = range(7, 7 + 4 * 24, 4)
_PATTERNS = 3
_SIZE = len(_SCENES) * len(_MANNERS) * _PATTERNS * 24 * 24


def lettering(count: int, seed: int, without: Set[str] = frozenset()) -> list[str]:
    """`count` different prompts, each with one text in straight quotes.

    Args:
        without: prompts that must not occur.

    Raises:
        UserError: there are not so many.
    """
    prompts: list[str] = []
    for index in shuffled(_SIZE, Random(seed)):
        if len(prompts) == count:
            return prompts
        prompt = _prompt(index)
        if prompt not in without:
            prompts.append(prompt)
    if len(prompts) < count:
        raise UserError(f"--count {count}: there are only {len(prompts)} such prompts")
    return prompts


def _prompt(index: int) -> str:
    scene, manner, pattern, first, second = digits(index, len(_SCENES), len(_MANNERS), _PATTERNS, 24, 24)
    text = (
        f"{_QUALITIES[first]} {_THINGS[second]}",
        f"{_THINGS[first]} {_NUMBERS[second]}",
        f"{_DEEDS[first]} the {_THINGS[second]}",
    )[pattern]
    return f"{_SCENES[scene].format(chr(34) + text + chr(34))}, {_MANNERS[manner]}"
