"""GenEval-style prompts: objects, their number, colour and place, with the metadata that the reward `geneval` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from random import Random
from typing import Any

from opd_ds.data.generators.drawing import digits, shuffled, two_of
from opd_ds.errors import UserError
from opd_ds.rewards.geneval.rules import CLASSES, COLOURS, RELATIONS

_UNITS = {"skis": "pair of", "scissors": "pair of", "broccoli": "head of"}  # words without a singular
_PLURALS = {
    "person": "people",
    "sheep": "sheep",
    "knife": "knives",
    "computer mouse": "computer mice",
}
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_COUNTED = tuple(label for label in CLASSES if label not in _UNITS)
_COLOURED = tuple(label for label in CLASSES if label != "person")

Entry = dict[str, Any]


@dataclass(frozen=True)
class _Kind:
    """All prompts of one tag, numbered from 0."""

    tag: str
    size: int
    make: Callable[[int], tuple[str, list[Entry], list[Entry]]]  # what is seen; include, exclude

    def entries(self, generator: Random, without: Set[str]) -> Iterator[Entry]:
        for index in shuffled(self.size, generator):
            seen, include, exclude = self.make(index)
            entry = {"tag": self.tag, "include": include, "exclude": exclude, "prompt": f"a photo of {seen}"}
            if entry["prompt"] not in without:
                yield {key: value for key, value in entry.items() if value}


def compositions(count: int, seed: int, without: Set[str] = frozenset()) -> list[Entry]:
    """`count` different prompts, the tags in turn as long as they have prompts left.

    Args:
        without: prompts that must not occur.

    Raises:
        UserError: there are not so many.
    """
    generator = Random(seed)
    streams = [kind.entries(generator, without) for kind in _KINDS]
    entries: list[Entry] = []
    while streams and len(entries) < count:
        for stream in list(streams):
            entry = next(stream, None)
            if entry is None:
                streams.remove(stream)
            elif len(entries) < count:
                entries.append(entry)
    if len(entries) < count:
        raise UserError(f"--count {count}: there are only {len(entries)} such prompts")
    return entries


def as_lines(entries: list[Entry]) -> str:
    """One object a line, as GenEval's `*_metadata.jsonl`."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _one(label: str, colour: str | None = None) -> str:
    """An object with its article."""
    words = " ".join(word for word in (_UNITS.get(label), colour, label) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _several(label: str, count: int) -> str:
    regular = label + ("es" if label.endswith(("s", "ch", "sh")) else "s")
    return f"{_NUMBERS[count]} {_PLURALS.get(label, regular)}"


def _clause(label: str, count: int = 1, **more: Any) -> Entry:
    return {"class": label, "count": count, **more}


def _single_object(index: int) -> tuple[str, list[Entry], list[Entry]]:
    return _one(CLASSES[index]), [_clause(CLASSES[index])], []


def _two_object(index: int) -> tuple[str, list[Entry], list[Entry]]:
    first, second = (CLASSES[place] for place in two_of(index, len(CLASSES)))
    return f"{_one(first)} and {_one(second)}", [_clause(first), _clause(second)], []


def _counting(index: int) -> tuple[str, list[Entry], list[Entry]]:
    place, number = digits(index, len(_COUNTED), len(_NUMBERS))
    label, count = _COUNTED[place], list(_NUMBERS)[number]
    return _several(label, count), [_clause(label, count)], [_clause(label, count + 1)]


def _colors(index: int) -> tuple[str, list[Entry], list[Entry]]:
    place, shade = digits(index, len(_COLOURED), len(COLOURS))
    label, colour = _COLOURED[place], COLOURS[shade]
    return _one(label, colour), [_clause(label, color=colour)], []


def _position(index: int) -> tuple[str, list[Entry], list[Entry]]:
    pair, place = digits(index, len(CLASSES) * (len(CLASSES) - 1), len(RELATIONS))
    (target, label), relation = (CLASSES[one] for one in two_of(pair, len(CLASSES))), RELATIONS[place]
    include = [_clause(target), _clause(label, position=[relation, 0])]
    return f"{_one(label)} {relation} {_one(target)}", include, []


def _color_attr(index: int) -> tuple[str, list[Entry], list[Entry]]:
    pair, shades = digits(index, len(_COLOURED) * (len(_COLOURED) - 1), len(COLOURS) * (len(COLOURS) - 1))
    labels = (_COLOURED[place] for place in two_of(pair, len(_COLOURED)))
    colours = (COLOURS[place] for place in two_of(shades, len(COLOURS)))
    asked = list(zip(labels, colours, strict=True))
    include = [_clause(label, color=colour) for label, colour in asked]
    return " and ".join(_one(label, colour) for label, colour in asked), include, []


_KINDS = (
    _Kind("single_object", len(CLASSES), _single_object),
    _Kind("two_object", len(CLASSES) * (len(CLASSES) - 1), _two_object),
    _Kind("counting", len(_COUNTED) * len(_NUMBERS), _counting),
    _Kind("colors", len(_COLOURED) * len(COLOURS), _colors),
    _Kind("position", len(CLASSES) * (len(CLASSES) - 1) * len(RELATIONS), _position),
    _Kind("color_attr", len(_COLOURED) * (len(_COLOURED) - 1) * len(COLOURS) * (len(COLOURS) - 1), _color_attr),
)
