"""Our scorer against the reference library: same images, same weights, how far apart?"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from opd_ds.errors import UserError
from tools.reference_parity.environment import Environment
from tools.reference_parity.ours import Ours
from tools.reference_parity.reward import ReferenceReward

# Odd margins, a wide and a tall one, one smaller than the networks' input; prompts that a tokenizer may trip over.
_SIZES = ((512, 512), (640, 512), (1024, 768), (333, 501), (768, 1024), (150, 100))
_PROMPTS = (
    "a photo of a corgi wearing a tiny red hat, studio light",
    "\u201ctwo green chairs\u201d, it\u2019s 5 o'clock &amp; raining",
    "Ein Haus am See, sehr schön; détail élevé!!",
    "",
    'a neon sign that says "OPEN 24/7" above three blue cars',
    "very long prompt " * 40,
)


@dataclass(frozen=True)
class Row:
    """One quantity on both sides.

    Attributes:
        difference: largest absolute one; infinite where a side lacks the quantity or has another shape.
        mean: of the reference.
        deviation: standard deviation of the reference over its elements, which the difference is to be seen against.
        largest: absolute value of the reference.
    """

    quantity: str
    difference: float
    mean: float = math.nan
    deviation: float = math.nan
    largest: float = math.nan

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most `tolerance`, relative to values above 1."""
        return self.difference <= tolerance * max(1.0, self.largest)


def compare(reference: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray]) -> list[Row]:
    """One row per quantity of either side, the score first."""
    rows = []
    for quantity in sorted(reference.keys() | ours.keys(), key=lambda key: (key != "score", key)):
        theirs, own = reference.get(quantity), ours.get(quantity)
        if theirs is None or own is None or theirs.shape != own.shape:
            rows.append(Row(quantity, math.inf))
            continue
        a, b = theirs.astype(np.float64), own.astype(np.float64)
        rows.append(Row(quantity, np.abs(a - b).max().item(), a.mean().item(), a.std().item(), np.abs(a).max().item()))
    return rows


def parity(
    environment: Environment, ours: Ours, weights: Path | None = None, pictures: Path | None = None
) -> list[Row]:
    """Score with both and compare.

    Args:
        weights: a published checkpoint; by default random weights that the reference library makes.
        pictures: a folder; an image's name without its ending, underscores read as spaces, is its prompt. By default
            drawn ones.

    Raises:
        UserError: an empty folder, or the reference library fails.
    """
    images, prompts = read_pictures(pictures) if pictures else (draw_pictures(), list(_PROMPTS))
    metadata: list[dict[str, Any]] = [{} for _ in prompts]
    with tempfile.TemporaryDirectory(prefix="opd_ds_parity_") as name:
        if weights is None:
            weights = Path(name) / "weights.pt"
            environment.run("random", str(weights))
        with closing(ReferenceReward(environment, weights)) as reference:
            theirs = reference.arrays(images, prompts, metadata)
        return compare(theirs, ours(weights, images, prompts, metadata))


def draw_pictures() -> list[Image.Image]:
    """Different on all scales, so that resizing and cropping show."""
    generator = np.random.default_rng(0)
    images = []
    for width, height in _SIZES:
        rough = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height))
        noise = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image = Image.blend(rough, noise, 0.3)
        box = sorted(generator.integers(0, width, 2).tolist()), sorted(generator.integers(0, height, 2).tolist())
        ImageDraw.Draw(image).ellipse((box[0][0], box[1][0], box[0][1], box[1][1]), fill=(20, 90, 200), outline="white")
        images.append(image)
    return images


def read_pictures(folder: Path) -> tuple[list[Image.Image], list[str]]:
    """RGB images of a folder in name order, and their prompts.

    Raises:
        UserError: there are none.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise UserError(f"{folder}: no images (png, jpg, jpeg, webp) there")
    return [Image.open(file).convert("RGB") for file in files], [file.stem.replace("_", " ") for file in files]


def print_rows(console: Console, title: str, rows: Sequence[Row], tolerance: float) -> None:
    table = Table("quantity", "max |difference|", "mean", "std", f"within {tolerance:g}", title=title)
    for row in rows:
        numbers = (f"{value:.3g}" for value in (row.difference, row.mean, row.deviation))
        table.add_row(row.quantity, *numbers, "yes" if row.within(tolerance) else "NO")
    console.print(table)
