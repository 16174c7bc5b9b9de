"""What ranks that train and ranks that hold teachers tell each other (`scoring.ranks`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opd_ds.models import Conditioning
from opd_ds.training.shares import Share


@dataclass(frozen=True)
class Prompts:
    """The encoded prompts of a round, those of a student rank; the questions that follow are about them.

    Attributes:
        uncond: what guidance sets against rows that have no negative prompt of their own.
    """

    cond: dict[Share, Conditioning]
    uncond: Conditioning


@dataclass(frozen=True)
class Question:
    """What a frozen network says at states of one step. The answer: velocities [b, C, ...], with `apart` those that
    guidance made them of beside them, [b, 3, C, ...]; none where there are no rows.

    Attributes:
        network: a task, or another name of `RunConfig.all_teachers`.
        rows: of the share's prompts, one for each state.
        states: [b, C, ...] on the host.
        sigma: of all of them.
        stage: which of a model's two networks.
    """

    network: str
    share: Share
    guidance: float
    apart: bool
    rows: list[int]
    states: Tensor
    sigma: float
    stage: int


@dataclass(frozen=True)
class Call:
    """A forward of a frozen network, for drawing with it. The answer is what it returns."""

    network: str
    inputs: dict[str, Any]


@dataclass(frozen=True)
class End:
    """There are no more questions, and the answer is the same.

    Attributes:
        code: with which all ranks leave, where they were asked to stop.
    """

    code: int | None = None


def is_end(message: Any) -> bool:
    return isinstance(message, End)
