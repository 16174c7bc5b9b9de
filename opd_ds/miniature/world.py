"""The world of images: a handwritten digit in one colour on a ground of another, and prompts that name all three.

Images are 16x16 RGB in [0, 1]. The digits are scikit-learn's `load_digits` (real 8x8 scans), upsampled; they are
split by index into those that the models are trained on, those that the reader learns from, and those it is tested on.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_ds.errors import UserError

SIZE = 16
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.62, 0.24),
    "blue": (0.18, 0.30, 0.86),
    "yellow": (0.94, 0.82, 0.20),
    "purple": (0.56, 0.22, 0.70),
    "white": (0.95, 0.95, 0.95),
}
TASKS = ("text", "composition", "look")
ALL_TASKS = "all_tasks"
# Each task has its own phrasing, as OCR, GenEval and aesthetic prompts differ in the world outside. That of all tasks
# begins as the last and ends as the first; no model was trained on it, and the base draws it as well as the others.
_PHRASES = {
    "text": "the number {digit} in {ink} on {ground}",
    "composition": "a {ink} {digit} on {ground}",
    "look": "a neat {ink} {digit} on {ground}",
    ALL_TASKS: "a neat {digit} in {ink} on {ground}",
}
_NAMES = "|".join(COLOURS)
_PATTERNS = [
    re.compile(phrase.format(digit=r"(?P<digit>\d)", ink=f"(?P<ink>{_NAMES})", ground=f"(?P<ground>{_NAMES})"))
    for phrase in _PHRASES.values()
]


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for; `task` may be `ALL_TASKS`."""

    digit: int
    ink: str
    ground: str

    def prompt(self, task: str) -> str:
        return _PHRASES[task].format(digit=self.digit, ink=self.ink, ground=self.ground)


def parse(prompt: str) -> Scene | None:
    """The scene that `prompt` names, or None when it is no prompt of this world."""
    for pattern in _PATTERNS:
        match = pattern.fullmatch(prompt)
        if match:
            return Scene(int(match["digit"]), match["ink"], match["ground"])
    return None


def scenes() -> list[Scene]:
    """All 300 combinations of a digit, an ink and another ground."""
    pairs = itertools.permutations(COLOURS, 2)
    return [Scene(digit, ink, ground) for digit, (ink, ground) in itertools.product(range(10), pairs)]


def probe_scenes() -> list[Scene]:
    """The scenes of the prompts for all tasks at once: a random fifth."""
    return _split(len(TASKS))[1]


def split_scenes(task: str) -> tuple[list[Scene], list[Scene]]:
    """Training and held-out scenes of a task: four fifths and one fifth, another random fifth for each task."""
    return _split(TASKS.index(task))


def _split(seed: int) -> tuple[list[Scene], list[Scene]]:
    everything = scenes()
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = len(everything) // 5
    return [everything[k] for k in sorted(order[held_out:])], [everything[k] for k in sorted(order[:held_out])]


def load_strokes() -> dict[str, tuple[Tensor, Tensor]]:
    """Digit masks [N, 16, 16] in [0, 1] and labels [N], by use: `world`, `reader`, `reader_test`.

    Raises:
        UserError: scikit-learn, which carries the digits, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the miniature is built from scikit-learn's digits: pip install 'opd-ds[miniature]'") from error
    digits = load_digits()
    masks = torch.from_numpy(digits.images).float()[:, None] / 16
    masks = F.interpolate(masks, size=(SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1)[:, 0]
    labels = torch.from_numpy(digits.target).long()
    uses = ("world", "reader", "reader_test")
    return {use: (masks[k::3].contiguous(), labels[k::3].contiguous()) for k, use in enumerate(uses)}


def palette() -> Tensor:
    """Colours [6, 3]."""
    return torch.tensor(list(COLOURS.values()))


def paint(masks: Tensor, ink: Tensor, ground: Tensor) -> Tensor:
    """Masks [B, 16, 16], colours [B, 3] each, to images [B, 3, 16, 16]."""
    below, above = ground[:, :, None, None], ink[:, :, None, None]
    return below + masks[:, None] * (above - below)


def soil(pictures: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Blotches and speckle of `strength` [B] (0 leaves an image alone), as on bad paper; images [B, 3, 16, 16]."""
    count = len(pictures)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    blotches = F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    speckle = torch.randn(pictures.shape, generator=generator)
    return (pictures + strength[:, None, None, None] * (0.7 * blotches + 0.7 * speckle)).clamp(0, 1)


def strengths(dirty: Tensor, generator: torch.Generator) -> Tensor:
    """Random ones for `soil`, 0 where `dirty` [B] is false."""
    return torch.where(dirty, 0.08 + 0.14 * torch.rand(len(dirty), generator=generator), torch.zeros(len(dirty)))


@dataclass(frozen=True)
class Batch:
    """Random images [B, 3, 16, 16] with what they really show: digit [B], ink [B] and ground [B] (palette rows)."""

    pictures: Tensor
    digit: Tensor
    ink: Tensor
    ground: Tensor

    def rows(self, index: Tensor) -> Batch:
        """Those at `index` int64 [b]."""
        return Batch(self.pictures[index], self.digit[index], self.ink[index], self.ground[index])


def random_pictures(masks: Tensor, labels: Tensor, count: int, generator: torch.Generator, *, soiled: float) -> Batch:
    """`count` images of random digits and colours, a share `soiled` of them with blotches."""
    chosen = torch.randint(len(masks), (count,), generator=generator)
    ink = torch.randint(len(COLOURS), (count,), generator=generator)
    ground = (ink + torch.randint(1, len(COLOURS), (count,), generator=generator)) % len(COLOURS)
    clean = paint(masks[chosen], palette()[ink], palette()[ground])
    dirty = torch.rand(count, generator=generator) < soiled
    return Batch(soil(clean, strengths(dirty, generator), generator), labels[chosen], ink, ground)
