"""How well, and how fast, the OCR reward reads drawn text.

    python -m benchmarks ocr-accuracy --output runs/ocr_accuracy.json

Draws images of 512 x 512 with one to four words each, in the fonts found on this machine: size, colours, rotation and
position vary. The same texts are drawn once on flat ground and once over filled circles and boxes. Prints the mean
score, what was not read exactly, and the time per image by number of workers.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from opd_ds.rewards import Reward, build

SIDE = 512
# fmt: off
WORDS = [
    "Hello", "World", "Coffee", "Open", "Closed", "Welcome", "Happy", "Birthday", "Sale", "Exit", "Library",
    "Museum", "Bakery", "Garden", "Sunset", "Ocean", "Mountain", "Deep", "Learning", "Fresh", "Bread", "Grand",
    "Opening", "Keep", "Calm", "Good", "Morning", "Night", "Train", "Station", "Street", "Music", "Festival",
    "Dream", "Big", "Stay", "Curious", "No", "Parking", "Free", "Wifi", "Book", "Store", "Summer", "Winter",
    "2024", "Room", "101", "Gate", "7", "Speed", "Limit", "55", "Caution", "Danger"
]
# fmt: on
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")
# Fonts of symbols, and those of other scripts, cannot draw the words.
NOT_LATIN = ("math", "symbol", "emoji", "dingbat", "icon", "cjk", "arab", "deva", "thai", "hebrew")


def fonts() -> list[Path | None]:
    """Every TrueType or OpenType font of this machine, and Pillow's own (None)."""
    files = [file for folder in FONT_FOLDERS for file in Path(folder).expanduser().rglob("*.[to]tf")]
    return [None, *sorted(file for file in files if not any(word in file.name.lower() for word in NOT_LATIN))]


def load(font: Path | None, size: int) -> Any:
    return ImageFont.load_default(size) if font is None else ImageFont.truetype(str(font), size)


def contrast(a: Sequence[int], b: Sequence[int]) -> float:
    """Difference in luma (Rec. 601), 0 to 255."""
    return abs(sum(w * (x - y) for w, x, y in zip((0.299, 0.587, 0.114), a, b, strict=True)))


def draw(rng: random.Random, font: Path | None, shapes: bool) -> tuple[Image.Image, str]:
    """One image and its text. The text fits, and stands out from its ground by at least 90 of 255."""
    lines = [" ".join(rng.sample(WORDS, rng.randint(1, 2))) for _ in range(rng.randint(1, 2))]
    ground, ink = ([rng.randrange(256) for _ in range(3)] for _ in range(2))
    while contrast(ground, ink) < 90:
        ink = [rng.randrange(256) for _ in range(3)]
    size = rng.randint(24, 72)  # in pixels
    angle = rng.uniform(-15, 15)
    sheet = Image.new("RGB", (SIDE, SIDE), tuple(ground))
    scenery = random.Random(rng.random())  # drawn from in any case: the text is the same with and without shapes
    if shapes:
        scatter(sheet, scenery, ink)
    layer = Image.new("L", (SIDE, SIDE))
    pen = ImageDraw.Draw(layer)
    while True:
        face = load(font, size)
        left, top, right, bottom = pen.multiline_textbbox((0, 0), "\n".join(lines), face)
        width, height = right - left, bottom - top
        turned = abs(math.sin(math.radians(angle))) * max(width, height)
        if width + turned < SIDE - 24 and height + turned < SIDE - 24:
            break
        size -= 2
    x, y = (SIDE - width) / 2 - left, (SIDE - height) / 2 - top
    pen.multiline_text((x, y), "\n".join(lines), 255, face)
    layer = layer.rotate(angle, Image.Resampling.BICUBIC)
    free_x, free_y = (SIDE - width - turned) / 2 - 8, (SIDE - height - turned) / 2 - 8
    shift = (round(rng.uniform(-free_x, free_x)), round(rng.uniform(-free_y, free_y)))
    sheet.paste(tuple(ink), shift, layer)
    return sheet, " ".join(lines)


def scatter(sheet: Image.Image, rng: random.Random, ink: list[int]) -> None:
    """A few filled shapes, none in a colour that swallows the ink."""
    pen = ImageDraw.Draw(sheet)
    for _ in range(6):
        colour = [rng.randrange(256) for _ in range(3)]
        if contrast(colour, ink) < 90:
            continue
        x, y, side = rng.randrange(SIDE), rng.randrange(SIDE), rng.randint(40, 200)
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape((x, y, x + side, y + side), fill=tuple(colour))


def pictures(count: int, seed: int, shapes: bool) -> list[tuple[Image.Image, str]]:
    faces = fonts()
    return [draw(random.Random(f"{seed}/{number}"), faces[number % len(faces)], shapes) for number in range(count)]


def measure(reward: Reward, drawn: list[tuple[Image.Image, str]]) -> dict[str, Any]:
    """Mean score, texts that were not read exactly with their scores, seconds (and of CPU time) per image."""
    images, texts = [image for image, _ in drawn], [text for _, text in drawn]
    started, started_cpu = time.perf_counter(), time.process_time()
    scores = reward.score(images, [f'a sign that says "{text}"' for text in texts])
    seconds = (time.perf_counter() - started) / len(images)
    cpu_seconds = (time.process_time() - started_cpu) / len(images)
    inexact = [(text, round(score, 3)) for text, score in zip(texts, scores.tolist(), strict=True) if score < 1]
    return {
        "pictures": len(images),
        "mean": round(scores.mean().item(), 4),
        "exact": len(images) - len(inexact),
        "seconds_per_picture": round(seconds, 3),
        "pictures_per_second": round(1 / seconds, 2),
        "cpu_seconds_per_picture": round(cpu_seconds, 3),
        "inexact": inexact,
    }


def bench(count: int, workers: Iterable[int], seed: int) -> dict[str, Any]:
    """By ground and number of workers, what `measure` says."""
    result: dict[str, Any] = {"fonts": len(fonts())}
    for number in workers:
        reward = build("ocr", workers=number)
        reward.score([image for image, _ in pictures(number, seed, False)], ['"warm-up"'] * number)
        for name, shapes in (("flat ground", False), ("over shapes", True)):
            result[f"{name}, {number} workers"] = measure(reward, pictures(count, seed, shapes))
        result["identity"] = reward.identity()
    return result
