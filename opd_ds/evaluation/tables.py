"""The tasks' headline table of a run, and its grid of images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from opd_ds.evaluation.clips import frames_of, thumbnail
from opd_ds.evaluation.evaluator import Means
from opd_ds.rewards import Clip, Drawn
from opd_ds.utils.tables import fitting

_TILE, _LABEL_WIDTH, _LABEL_HEIGHT, _GAP = 96, 150, 16, 6
_CLIP_SIDE = 256  # pixels of a clip in a grid, at most: a grid of whole clips would be hundreds of megabytes
_NAME_LENGTH = 22  # characters of a model's name that fit into the label's width


def summary(results: dict[str, Means], headlines: dict[str, str | None]) -> dict[str, Any]:
    """`tasks`: base, teacher and student of each task by its headline reward; `models`: every model on every task.

    What is absent is None.

    Args:
        results: mean rewards, keyed `base`, `teacher:<task>` and `student`.
        headlines: by task, the label of the reward that stands for it.
    """

    def score(model: str, task: str) -> float | None:
        value = results.get(model, {}).get(task, {}).get(headlines[task] or "", math.nan)
        return value if math.isfinite(value) else None

    by_task = {
        task: {
            "base": score("base", task),
            "teacher": score(f"teacher:{task}", task),
            "student": score("student", task),
        }
        for task in headlines
    }
    return {"tasks": by_task, "models": {model: {task: score(model, task) for task in headlines} for model in results}}


def print_table(console: Console, data: dict[str, Any], uncertain: Mapping[str, float]) -> None:
    """Models by tasks; a task's own teacher is marked, the last row is the share of each teacher's gain kept.

    Args:
        uncertain: by task, how far scores are uncertain; of a gain that is not above it no share is shown.
    """
    tasks = list(data["tasks"])
    rows = [
        [model, *(_cell(scores[task]) + ("*" if model == f"teacher:{task}" else " ") for task in tasks)]
        for model, scores in data["models"].items()
    ]
    kept = [gain_kept(data["tasks"][task], uncertain.get(task, 0.0)) for task in tasks]
    if any(value is not None for value in kept):
        rows.append(["gain kept", *("-" if value is None else f"{100 * value:.0f} % " for value in kept)])
    console.print("mean reward on held-out prompts")
    for table in fitting(["model", *tasks], rows, console.width):
        console.print(table)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def gain_kept(scores: dict[str, float | None], uncertain: float = 0.0) -> float | None:
    """(student - base) / (teacher - base), or None when a score is missing or the teacher gained no more than
    `uncertain`.
    """
    base, teacher, student = scores["base"], scores["teacher"], scores["student"]
    if base is None or teacher is None or student is None or teacher - base <= uncertain:
        return None
    return (student - base) / (teacher - base)


def comparison_grid(
    models: dict[str, dict[str, list[Drawn]]], prompts: dict[str, list[str]], references: dict[str, list[Image.Image]]
) -> Drawn | None:
    """One row per model, one column per prompt, tasks side by side; of clips a clip of that, smaller and with fewer
    frames. None when there are no images. All columns are as wide as the widest image: others stand in the middle of
    theirs, in their own proportions.

    Args:
        models: the same images or clips of each model, by task.
        prompts: by task, in the images' order.
        references: by task, the first reference picture of each prompt, for a row above; none where prompts have none.
    """
    small = {
        model: {task: [_for_grid(one) for one in shown] for task, shown in by_task.items()}
        for model, by_task in models.items()
    }

    def sheet(place: int) -> Image.Image:
        """Of the frame `place` of all."""
        stills = {
            model: {task: [frames_of(one)[place] for one in shown] for task, shown in by_task.items()}
            for model, by_task in small.items()
        }
        return _sheet(stills, prompts, references)

    first = next((one for shown in next(iter(small.values()), {}).values() for one in shown), None)
    if isinstance(first, Clip):
        return Clip(tuple(map(sheet, range(len(first.frames)))), first.fps)
    return None if first is None else sheet(0)


def _for_grid(drawn: Drawn) -> Drawn:
    return thumbnail(drawn, _CLIP_SIDE) if isinstance(drawn, Clip) else drawn


def _sheet(
    models: dict[str, dict[str, list[Image.Image]]],
    prompts: dict[str, list[str]],
    references: dict[str, list[Image.Image]],
) -> Image.Image:
    first = next(iter(models.values()))
    columns = [(task, k) for task, pictures in first.items() for k in range(len(pictures))]
    pictured = [picture.size for pictures in first.values() for picture in pictures]
    if any(references.values()):
        models = {"picture": references, **models}
    tile = tuple(max(_TILE, *sides) for sides in zip(*((height, width) for width, height in pictured), strict=True))
    step_y, step_x = tile[0] + _GAP, tile[1] + _GAP
    header = 3 * _LABEL_HEIGHT
    size = (_LABEL_WIDTH + step_x * len(columns), header + step_y * len(models))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for column, (task, k) in enumerate(columns):
        lines = [task if k == 0 else "", *_wrapped(prompts[task][k], tile[1] // 6)[:2]]
        for number, line in enumerate(lines):
            draw.text((_LABEL_WIDTH + column * step_x, number * _LABEL_HEIGHT + 2), line, "black", font)
    for row, (model, by_task) in enumerate(models.items()):
        top = header + row * step_y
        for number, line in enumerate(_wrapped_name(model)):
            draw.text((_GAP, top + tile[0] // 2 - 6 + number * _LABEL_HEIGHT), line, "black", font)
        for column, (task, k) in enumerate(columns):
            if k < len(by_task.get(task, [])):
                picture = _fitted(by_task[task][k], tile)
                left = _LABEL_WIDTH + column * step_x + (tile[1] - picture.width) // 2
                sheet.paste(picture, (left, top + (tile[0] - picture.height) // 2))
    return sheet


def _fitted(picture: Image.Image, tile: tuple[int, ...]) -> Image.Image:
    """As large as `tile` (height, width) takes it."""
    scale = min(tile[0] / picture.height, tile[1] / picture.width)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _wrapped_name(name: str) -> list[str]:
    """A name has no spaces to break at; three lines fit beside a tile."""
    return [name[start : start + _NAME_LENGTH] for start in range(0, len(name), _NAME_LENGTH)][:3]
