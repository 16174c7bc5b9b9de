"""GenEval's rules: from detected objects to a verdict. Pure geometry and counting; no network, no torch.

Sources: `evaluation/evaluate_images.py` and `summary_scores.py` of github.com/djghosh13/geneval (the benchmark), and
`reward_server/gen_eval.py` of github.com/yifan123/reward-server, the server that Flow-GRPO trains with (the partial
score). Their quirks are kept, because published numbers contain them:

- The threshold is 0.3, but 0.9 under the tag `counting`; a score equal to the threshold is not enough.
- Nothing suppresses duplicates: the published `max_overlap` of 1.0 switches the overlap test off.
- Of each class the 16 most confident detections stay.
- Colour and position are asked of the `count` most confident objects only, never of a better-fitting one below them.
- "Left of" and its like allow the other axis too: an object can be both left of and above another one.
- The offset loses a tenth of both boxes' sizes before it is compared, but is divided by its full length, so a near
  object on the right side may still have no relation at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_ds.errors import UserError, nearest, shown

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
POSITION_THRESHOLD = 0.1

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# COCO's 80 classes in the order of a detector's labels, under GenEval's names (computer mouse, tv remote, ...).
CLASSES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)


@dataclass(frozen=True)
class Detection:
    """One object a detector found.

    Attributes:
        label: one of CLASSES.
        score: confidence in [0, 1].
        box: left, top, right, bottom in pixels of the image.
        mask: [H, W] bool, the object's pixels; the rules do not read it, the colour classifier does.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Clause:
    """So many objects of a class; optionally their colour, and where they are relative to an earlier clause."""

    label: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Task:
    """What a prompt asks for: every `include` clause, and fewer than `count` objects for every `exclude` clause."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    @classmethod
    def parse(cls, metadata: Mapping[str, Any]) -> Task | None:
        """Read a line of GenEval's prompt file; None when it is not one (it has no `tag` or no `include`).

        Raises:
            UserError: an unknown tag, class, colour or relation, a count or target that cannot be meant, or clauses
                that are no list of objects.
        """
        if not metadata.get("tag") or not metadata.get("include"):
            return None
        _allowed("tag", metadata["tag"], TAGS)
        include = tuple(_clause(item, position) for position, item in enumerate(_items(metadata, "include")))
        exclude = tuple(_clause(item, position=0) for item in _items(metadata, "exclude"))
        return cls(metadata["tag"], include, exclude)


def _items(metadata: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    found = metadata.get(key) or []
    if not isinstance(found, list | tuple) or not all(isinstance(item, Mapping) for item in found):
        raise UserError(f"GenEval metadata: {key} = {shown(found)}; allowed: a list of objects with class and count")
    return found


def _clause(item: Mapping[str, Any], position: int) -> Clause:
    """A clause; `position` is its own index, a position's target has to stand before it."""
    count = item.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"GenEval metadata: count = {shown(count)} in {shown(item)}; allowed: a whole number from 1")
    label = _allowed("class", item.get("class"), CLASSES)
    colour = item.get("color")
    if colour is not None:
        _allowed("color", colour, COLOURS)
    match item.get("position"):
        case None:
            return Clause(label, count, colour)
        case [relation, int(target)] if target in range(position):
            return Clause(label, count, colour, _allowed("position", relation, RELATIONS), target)
        case other:
            raise UserError(
                f"GenEval metadata: position = {shown(other)} in clause {position}; "
                "allowed: a relation and the index of an earlier clause, such as ['left of', 0]"
            )


def _allowed(key: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        known = ", ".join(allowed) if len(allowed) <= len(COLOURS) else f"the {len(allowed)} names of GenEval"
        raise UserError(f"GenEval metadata: {key} = {shown(value)}; allowed: {known}.{nearest(str(value), allowed)}")
    return str(value)


Found = Mapping[str, Sequence[Detection]]
# The colours of objects of one class, in their order. May be slow, so it is asked only where the verdict needs it.
ColoursOf = Callable[[str, Sequence[Detection]], Sequence[str]]


def keep(detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """Detections that count under `tag`, by class, the most confident first; at most 16 of each class."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: d.score, reverse=True):
        of_class = found.setdefault(detection.label, [])
        if detection.score > threshold and len(of_class) < MAX_OBJECTS:
            of_class.append(detection)
    return found


def is_correct(found: Found, task: Task, colours_of: ColoursOf) -> bool:
    """The benchmark's verdict (`evaluate` in evaluate_images.py), "strict" here.

    Every clause needs at least `count` objects of its class; its `count` most confident ones all have the colour, and
    each stands in the relation to each of the target clause's objects. A clause that fails cannot be a target. More
    objects than asked for are no mistake, unless an `exclude` clause (tag `counting`) reaches its count.
    """
    matched: list[Sequence[Detection] | None] = []
    for clause in task.include:
        chosen = found.get(clause.label, ())[: clause.count]
        fulfilled = (
            len(chosen) == clause.count
            and (clause.colour is None or list(colours_of(clause.label, chosen)).count(clause.colour) == clause.count)
            and (clause.relation is None or _in_relation(chosen, clause.relation, matched[clause.target]))
        )
        matched.append(chosen if fulfilled else None)
    return None not in matched and all(len(found.get(c.label, ())) < c.count for c in task.exclude)


def partial_score(found: Found, task: Task, colours_of: ColoursOf) -> float:
    """The mean of sub-scores that Flow-GRPO trains on (`evaluate_reward` in gen_eval.py). At most 1; can be negative.

    Each clause with `n` objects found of `count` asked adds
      - 1 - |count - n| / count, which falls below 0 beyond twice the count;
      - if n differs from count and it names a colour or a position: one 0;
      - if n equals count and it names a colour: 1 - (count - those of that colour) / count;
      - if it names a position, and count and colour were right: 0 when the target clause failed; otherwise 1, preceded
        by a 0 when the relation does not hold. So a wrong position costs a half of that part, not all of it.
    `exclude` clauses are not read. All sub-scores are 1 exactly when Flow-GRPO calls the image `strict_correct`: the
    counts are then equal to those asked for, where `is_correct` takes them as a minimum.
    """
    parts: list[float] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in task.include:
        objects = found.get(clause.label, ())
        fulfilled = len(objects) == clause.count
        parts.append(1 - abs(clause.count - len(objects)) / clause.count)
        if not fulfilled and (clause.colour is not None or clause.relation is not None):
            parts.append(0.0)
        if fulfilled and clause.colour is not None:
            right = list(colours_of(clause.label, objects)).count(clause.colour)
            parts.append(1 - (clause.count - right) / clause.count)
            fulfilled = right == clause.count
        if fulfilled and clause.relation is not None:
            target = matched[clause.target]
            fulfilled = _in_relation(objects, clause.relation, target)
            if not fulfilled:
                parts.append(0.0)
            if target is not None:
                parts.append(1.0)
        matched.append(objects if fulfilled else None)
    return sum(parts) / len(parts)


def _in_relation(objects: Sequence[Detection], relation: str, targets: Sequence[Detection] | None) -> bool:
    """Whether each object stands in the relation to each target; a target clause that failed (None) has none."""
    return targets is not None and all(relation in relations(a.box, b.box) for a in objects for b in targets)


def relations(box: tuple[float, float, float, float], target: tuple[float, float, float, float]) -> frozenset[str]:
    """Where `box` is relative to `target`: none, one or two of RELATIONS.

    With o the offset of the centres and w, w' the two boxes' sizes, per axis:
    d = max(|o| - 0.1 (w + w'), 0) sign(o) / |o|_2; a relation holds beyond 0.5.
    """
    a, b = (np.array(corners, dtype=np.float32).reshape(2, 2) for corners in (box, target))
    offset = a.mean(0) - b.mean(0)
    margin = POSITION_THRESHOLD * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0]))
    revised = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return frozenset()
    dx, dy = revised / np.linalg.norm(offset)
    held = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(relation for relation, holds in held.items() if holds)


def tag_means(scores: Iterable[float], metadata: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean score of each tag present, in the order of TAGS, and `overall`: the mean of these means.

    The published overall is this one, not the mean over images. NaN (no score) is left out.
    """
    by_tag: dict[str, list[float]] = {}
    for score, item in zip(scores, metadata, strict=True):
        if not math.isnan(score):
            by_tag.setdefault(item["tag"], []).append(float(score))
    means = {tag: sum(by_tag[tag]) / len(by_tag[tag]) for tag in TAGS if tag in by_tag}
    return {**means, "overall": sum(means.values()) / len(means) if means else math.nan}
