"""GenEval's verdicts on hand-made detections, each expectation worked out by hand; its prompt file's format."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opd_ds.data import PromptSet
from opd_ds.errors import UserError
from opd_ds.rewards.geneval import tag_means
from opd_ds.rewards.geneval.rules import CLASSES, Detection, Task, is_correct, keep, partial_score, relations

Box = tuple[float, float, float, float]

HERE: Box = (0, 0, 100, 100)
LEFT: Box = (0, 100, 100, 200)
MIDDLE: Box = (150, 100, 250, 200)
RIGHT: Box = (300, 100, 400, 200)
TOP: Box = (100, 0, 200, 100)
BOTTOM: Box = (100, 300, 200, 400)


@dataclass(frozen=True)
class Painted(Detection):
    """A detection whose colour the classifier stand-in below knows."""

    colour: str = "white"


def seen(label: str, score: float = 0.95, box: Box = HERE, colour: str = "white") -> Painted:
    return Painted(label, score, box, None, colour)


def crowd(label: str, count: int, score: float = 0.95) -> list[Painted]:
    return [seen(label, score, (20 * i, 0, 20 * i + 15, 50)) for i in range(count)]


def colours_of(label: str, objects: Sequence[Detection]) -> list[str]:
    assert all(o.label == label for o in objects)
    return [o.colour for o in objects if isinstance(o, Painted)]


def clause(label: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **more}


SINGLE = {"tag": "single_object", "include": [clause("apple")]}
TWO = {"tag": "two_object", "include": [clause("apple"), clause("dog")]}
THREE = {"tag": "counting", "include": [clause("apple", 3)], "exclude": [clause("apple", 4)]}
FOUR = {"tag": "counting", "include": [clause("apple", 4)], "exclude": [clause("apple", 5)]}
RED = {"tag": "colors", "include": [clause("apple", color="red")]}
RED_PAIR = {"tag": "colors", "include": [clause("apple", 2, color="red")]}
RED_BLACK = {"tag": "color_attr", "include": [clause("apple", color="red"), clause("dog", color="black")]}


def dog_is(relation: str, **colours: str) -> dict[str, Any]:
    """A dog in `relation` to an apple; optionally with the colours of both."""
    apple = clause("apple", **({"color": colours["apple"]} if "apple" in colours else {}))
    dog = clause("dog", position=[relation, 0], **({"color": colours["dog"]} if "dog" in colours else {}))
    return {"tag": "position", "include": [apple, dog]}


def dog_and_apple(dog: Box, apple: Box, dog_colour: str = "white", apple_colour: str = "white") -> list[Painted]:
    return [seen("dog", 0.9, dog, dog_colour), seen("apple", 0.8, apple, apple_colour)]


# id, metadata, detections, strict, partial
CASES: list[tuple[str, dict[str, Any], list[Painted], bool, float]] = [
    # one object: (1 - |1 - n|)
    ("single", SINGLE, [seen("apple")], True, 1),
    ("single-empty", SINGLE, [], False, 0),
    ("single-other-class", SINGLE, [seen("dog"), seen("cat")], False, 0),
    ("single-two-are-no-mistake", SINGLE, crowd("apple", 2), True, 0),
    ("single-three", SINGLE, crowd("apple", 3), True, -1),
    ("single-just-above-threshold", SINGLE, [seen("apple", 0.31)], True, 1),
    ("single-at-threshold", SINGLE, [seen("apple", 0.3)], False, 0),
    ("single-below-threshold", SINGLE, [seen("apple", 0.29)], False, 0),
    ("single-second-below-threshold", SINGLE, [seen("apple"), seen("apple", 0.2)], True, 1),
    ("single-among-others", SINGLE, [seen("apple"), *crowd("dog", 9), *crowd("cat", 9)], True, 1),
    ("single-overlapping-twice", SINGLE, [seen("apple", 0.9), seen("apple", 0.8)], True, 0),
    ("single-sixteen", SINGLE, crowd("apple", 16), True, -14),
    ("single-twenty-count-as-sixteen", SINGLE, crowd("apple", 20), True, -14),
    # two objects: the mean over both classes
    ("two", TWO, [seen("apple"), seen("dog")], True, 1),
    ("two-first-only", TWO, [seen("apple")], False, 0.5),
    ("two-second-only", TWO, [seen("dog")], False, 0.5),
    ("two-empty", TWO, [], False, 0),
    ("two-other-classes", TWO, [seen("cat"), seen("bear")], False, 0),
    ("two-one-doubled", TWO, [*crowd("apple", 2), seen("dog")], True, 0.5),
    ("two-both-doubled", TWO, [*crowd("apple", 2), *crowd("dog", 2)], True, 0),
    ("two-one-tripled", TWO, [*crowd("apple", 3), seen("dog")], True, 0),
    ("two-crowd-of-one", TWO, crowd("apple", 3), False, -0.5),
    ("two-one-at-threshold", TWO, [seen("apple"), seen("dog", 0.3)], False, 0.5),
    ("two-on-one-spot", TWO, [seen("apple", box=HERE), seen("dog", box=HERE)], True, 1),
    ("two-and-a-third-class", TWO, [seen("apple"), seen("dog"), seen("cat")], True, 1),
    # counting: threshold 0.9, and one too many is wrong; 1 - |3 - n| / 3
    ("counting", THREE, crowd("apple", 3), True, 1),
    ("counting-empty", THREE, [], False, 0),
    ("counting-one", THREE, crowd("apple", 1), False, 1 / 3),
    ("counting-one-short", THREE, crowd("apple", 2), False, 2 / 3),
    ("counting-one-too-many", THREE, crowd("apple", 4), False, 2 / 3),
    ("counting-double", THREE, crowd("apple", 6), False, 0),
    ("counting-more-than-double", THREE, crowd("apple", 7), False, -1 / 3),
    ("counting-crowd-capped-at-sixteen", THREE, crowd("apple", 25), False, 1 - 13 / 3),
    ("counting-unsure", THREE, crowd("apple", 3, 0.89), False, 0),
    ("counting-at-threshold", THREE, crowd("apple", 3, 0.9), False, 0),
    ("counting-fourth-unsure", THREE, [*crowd("apple", 3), seen("apple", 0.85)], True, 1),
    ("counting-third-unsure", THREE, [*crowd("apple", 2), seen("apple", 0.85)], False, 2 / 3),
    ("counting-overlapping", THREE, [seen("apple", s) for s in (0.99, 0.98, 0.97)], True, 1),
    ("counting-duplicate-counts", THREE, [seen("apple", s) for s in (0.99, 0.98, 0.97, 0.96)], False, 2 / 3),
    ("counting-other-class-is-free", THREE, [*crowd("apple", 3), *crowd("dog", 5)], True, 1),
    ("counting-other-class-only", THREE, crowd("dog", 3), False, 0),
    ("counting-four", FOUR, crowd("apple", 4), True, 1),
    ("counting-four-got-five", FOUR, crowd("apple", 5), False, 0.75),
    # colour: count, then share of the right colour; a wrong count forfeits the colour
    ("colour", RED, [seen("apple", colour="red")], True, 1),
    ("colour-wrong", RED, [seen("apple", colour="green")], False, 0.5),
    ("colour-empty", RED, [], False, 0),
    ("colour-on-another-class", RED, [seen("dog", colour="red")], False, 0),
    ("colour-beside-another-class", RED, [seen("apple", colour="red"), seen("dog", colour="red")], True, 1),
    ("colour-best-is-right", RED, [seen("apple", 0.9, LEFT, "red"), seen("apple", 0.8, RIGHT, "green")], True, 0),
    ("colour-best-is-wrong", RED, [seen("apple", 0.8, LEFT, "red"), seen("apple", 0.9, RIGHT, "green")], False, 0),
    ("colour-right-one-unsure", RED, [seen("apple", 0.3, LEFT, "red"), seen("apple", 0.9, RIGHT)], False, 0.5),
    ("colour-three-right", RED, [seen("apple", s, colour="red") for s in (0.9, 0.8, 0.7)], True, -0.5),
    ("colour-overlapping-twice", RED, [seen("apple", s, HERE, "red") for s in (0.9, 0.8)], True, 0),
    ("colour-pair", RED_PAIR, [seen("apple", s, colour="red") for s in (0.9, 0.8)], True, 1),
    ("colour-pair-half", RED_PAIR, [seen("apple", colour="red"), seen("apple", colour="green")], False, 0.75),
    ("colour-pair-one", RED_PAIR, [seen("apple", colour="red")], False, 0.25),
    ("colour-pair-three", RED_PAIR, [seen("apple", s, colour="red") for s in (0.9, 0.8, 0.7)], True, 0.25),
    # position: apple's count, dog's count, relation; a wrong relation adds 0 and 1, so 3/4
    ("left", dog_is("left of"), dog_and_apple(LEFT, RIGHT), True, 1),
    ("left-is-right", dog_is("left of"), dog_and_apple(RIGHT, LEFT), False, 0.75),
    ("right", dog_is("right of"), dog_and_apple(RIGHT, LEFT), True, 1),
    ("above", dog_is("above"), dog_and_apple(TOP, BOTTOM), True, 1),
    ("above-is-below", dog_is("above"), dog_and_apple(BOTTOM, TOP), False, 0.75),
    ("below", dog_is("below"), dog_and_apple(BOTTOM, TOP), True, 1),
    ("left-is-above", dog_is("left of"), dog_and_apple(TOP, BOTTOM), False, 0.75),
    ("left-on-one-spot", dog_is("left of"), dog_and_apple(HERE, HERE), False, 0.75),
    ("left-touching", dog_is("left of"), dog_and_apple((0, 0, 100, 100), (100, 0, 200, 100)), True, 1),
    ("left-overlapping", dog_is("left of"), dog_and_apple((0, 0, 100, 100), (60, 0, 160, 100)), True, 1),
    ("left-overlapping-too-much", dog_is("left of"), dog_and_apple((0, 0, 100, 100), (30, 0, 130, 100)), False, 0.75),
    ("left-at-the-half", dog_is("left of"), dog_and_apple((0, 0, 100, 100), (40, 0, 140, 100)), False, 0.75),
    ("left-and-above", dog_is("left of"), dog_and_apple((0, 0, 100, 100), (300, 300, 400, 400)), True, 1),
    ("above-and-left", dog_is("above"), dog_and_apple((0, 0, 100, 100), (300, 300, 400, 400)), True, 1),
    ("left-but-mostly-above", dog_is("left of"), dog_and_apple((0, 0, 100, 100), (50, 400, 150, 500)), False, 0.75),
    ("left-large", dog_is("left of"), dog_and_apple((0, 0, 500, 100), (300, 0, 800, 100)), True, 1),
    ("left-no-apple", dog_is("left of"), [seen("dog", box=LEFT)], False, 1 / 3),
    ("left-no-dog", dog_is("left of"), [seen("apple", box=RIGHT)], False, 1 / 3),
    ("left-empty", dog_is("left of"), [], False, 0),
    (
        "left-best-dog-decides",
        dog_is("left of"),
        [seen("dog", 0.9, LEFT), seen("dog", 0.5, RIGHT), seen("apple", 0.8, MIDDLE)],
        True,
        1 / 3,
    ),
    (
        "left-best-dog-is-right",
        dog_is("left of"),
        [seen("dog", 0.5, LEFT), seen("dog", 0.9, RIGHT), seen("apple", 0.8, MIDDLE)],
        False,
        1 / 3,
    ),
    (
        "left-best-apple-decides",
        dog_is("left of"),
        [seen("dog", 0.9, MIDDLE), seen("apple", 0.8, RIGHT), seen("apple", 0.7, LEFT)],
        True,
        1 / 3,
    ),
    # colour of two objects: per object count and colour
    ("attr", RED_BLACK, dog_and_apple(LEFT, RIGHT, "black", "red"), True, 1),
    ("attr-swapped", RED_BLACK, dog_and_apple(LEFT, RIGHT, "red", "black"), False, 0.5),
    ("attr-one-wrong", RED_BLACK, dog_and_apple(LEFT, RIGHT, "black", "pink"), False, 0.75),
    ("attr-one-missing", RED_BLACK, [seen("dog", colour="black")], False, 0.5),
    ("attr-missing-and-wrong", RED_BLACK, [seen("dog", colour="red")], False, 0.25),
    ("attr-empty", RED_BLACK, [], False, 0),
    ("attr-on-one-spot", RED_BLACK, dog_and_apple(HERE, HERE, "black", "red"), True, 1),
    (
        "attr-second-apple-green",
        RED_BLACK,
        [seen("apple", 0.9, LEFT, "red"), seen("apple", 0.7, RIGHT, "green"), seen("dog", colour="black")],
        True,
        0.5,
    ),
    (
        "attr-three-red-apples",
        RED_BLACK,
        [*(seen("apple", s, colour="red") for s in (0.9, 0.8, 0.7)), seen("dog", colour="black")],
        True,
        0.25,
    ),
    # colour and position in one prompt: not published, but the format allows it
    ("both", dog_is("left of", dog="black"), dog_and_apple(LEFT, RIGHT, "black"), True, 1),
    ("both-colour-wrong", dog_is("left of", dog="black"), dog_and_apple(LEFT, RIGHT, "pink"), False, 2 / 3),
    ("both-place-wrong", dog_is("left of", dog="black"), dog_and_apple(RIGHT, LEFT, "black"), False, 0.8),
    ("both-no-dog", dog_is("left of", dog="black"), [seen("apple")], False, 1 / 3),
    ("target-of-wrong-colour", dog_is("left of", apple="red"), dog_and_apple(LEFT, RIGHT), False, 0.5),
]


@pytest.mark.parametrize(
    ("metadata", "detections", "strict", "partial"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_verdicts(metadata: dict[str, Any], detections: list[Painted], strict: bool, partial: float) -> None:
    task = Task.parse(metadata)
    assert task is not None
    # The order in which a detector lists its objects must not matter.
    for order in (detections, detections[::-1]):
        found = keep(order, task.tag)
        assert is_correct(found, task, colours_of) is strict
        assert partial_score(found, task, colours_of) == pytest.approx(partial, abs=1e-12)


def test_colours_are_asked_only_of_objects_that_decide() -> None:
    asked: list[int] = []

    def counting(label: str, objects: Sequence[Detection]) -> list[str]:
        asked.append(len(objects))
        return ["red"] * len(objects)

    task = Task.parse(RED)
    assert task is not None
    is_correct(keep(crowd("apple", 5), task.tag), task, counting)
    is_correct(keep([], task.tag), task, counting)
    partial_score(keep(crowd("apple", 5), task.tag), task, counting)
    assert asked == [1]


def test_two_relations_at_once_and_opposites() -> None:
    assert relations((0, 0, 10, 10), (100, 100, 110, 110)) == {"left of", "above"}
    assert relations((100, 100, 110, 110), (0, 0, 10, 10)) == {"right of", "below"}
    assert relations(HERE, HERE) == frozenset()


def test_reads_the_published_format(tmp_path: Path) -> None:
    file = tmp_path / "metadata.jsonl"
    rows = [
        {**THREE, "prompt": "a photo of three apples"},
        {**dog_is("right of"), "prompt": "a photo of a dog right of an apple"},
        {**RED_BLACK, "prompt": "a photo of a red apple and a black dog"},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    counting, position, attributes = (Task.parse(item) for item in PromptSet.read(file).metadata)
    assert counting is not None
    assert position is not None
    assert attributes is not None
    assert (counting.include[0].count, counting.exclude[0].count) == (3, 4)
    assert (position.include[1].relation, position.include[1].target) == ("right of", 0)
    assert [c.colour for c in attributes.include] == ["red", "black"]


@pytest.mark.parametrize(
    "metadata", [{}, {"tag": "counting"}, {"include": [clause("apple")]}, {"tag": "", "include": []}]
)
def test_other_prompts_are_not_tasks(metadata: dict[str, Any]) -> None:
    assert Task.parse(metadata) is None


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"tag": "count", "include": [clause("apple")]}, "'count'"),
        ({"tag": "counting", "include": [clause("aple")]}, "Did you mean 'apple'"),
        ({"tag": "counting", "include": [clause("apple", 0)]}, "count = 0"),
        ({"tag": "counting", "include": [{"class": "apple"}]}, "count = None"),
        ({"tag": "colors", "include": [clause("apple", color="redd")]}, "Did you mean 'red'"),
        ({"tag": "position", "include": [clause("apple", position=["beside", 0])]}, "clause 0"),
        ({"tag": "position", "include": [clause("dog"), clause("apple", position=["beside", 0])]}, "'beside'"),
        ({"tag": "position", "include": [clause("dog"), clause("apple", position=["above", 1])]}, "earlier clause"),
        ({"tag": "position", "include": [clause("dog"), clause("apple", position="above")]}, "earlier clause"),
        ({"tag": "counting", "include": [clause("apple")], "exclude": [clause("pear")]}, "'pear'"),
    ],
)
def test_malformed_metadata_is_named(metadata: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match="GenEval metadata") as caught:
        Task.parse(metadata)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_class_names_follow_coco() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    # COCO's indices of the three that GenEval renames, and of the ends.
    at = {0: "person", 64: "computer mouse", 65: "tv remote", 66: "computer keyboard", 79: "toothbrush"}
    assert {index: CLASSES[index] for index in at} == at


def test_overall_is_the_mean_of_the_tags_means() -> None:
    metadata = [{"tag": "counting"}] * 3 + [{"tag": "colors"}] * 2
    means = tag_means([1.0, 0.0, math.nan, 1.0, 1.0], metadata)
    assert means == {"counting": 0.5, "colors": 1.0, "overall": 0.75}
    assert math.isnan(tag_means([math.nan], [{"tag": "colors"}])["overall"])
