"""A weighted sum of rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.rewards.base import Metadata, Needs, Reward, Takes
from opd_ds.rewards.clips import OfClips, takes_clips
from opd_ds.rewards.references import References, score_with, takes_references
from opd_ds.rewards.registry import build, needs_of, rehearse, takes_of


@dataclass(frozen=True)
class _Part:
    reward: str
    weight: float
    options: dict[str, Any]


def _parts(parts: Any) -> dict[str, _Part]:
    """By label: `{label: weight}`, or `{label: {reward, weight, and the reward's own options}}`."""
    if not isinstance(parts, Mapping) or not parts:
        raise UserError(f"reward 'mix': parts = {parts!r}: expected reward names and weights, as in {{'pickscore': 1}}")
    read = {}
    for label, value in parts.items():
        options = dict(value) if isinstance(value, Mapping) else {"weight": value}
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"reward 'mix': the weight of {label!r} is {weight!r}; a finite number is needed")
        read[str(label)] = _Part(options.pop("reward", str(label)), float(weight), options)
    return read


class Mix:
    """The weighted sum of its parts, in the unit and range that these give it. NaN where a part is NaN.

    Where one of the parts takes clips, so does the sum: the others then give the mean over the frames.

    The parts are taken as they are: a part with wide range outweighs one with narrow range unless the weights say
    otherwise (PickScore moves by hundredths, HPSv2 by thousandths, OCR by tenths).

    Args:
        parts: reward names and weights, `{"pickscore": 1, "clipscore": 0.5}`. In place of a weight a mapping with
            `weight` (1 when absent), the reward's own options, and `reward` where the label is not its name:
            `{"here": {"reward": "ocr", "workers": 2}, "there": {"reward": "remote", "url": "http://host:8000"}}`.
        device: for the parts that run a network.
    """

    name = "mix"
    needs: ClassVar[Needs] = Needs()

    @classmethod
    def needs_for(cls, options: Mapping[str, Any]) -> Needs:
        """Everything that the parts need."""
        parts = _parts(options.get("parts")).items()
        needs = [needs_of(part.reward, f"parts.{label}", part.options) for label, part in parts]
        return Needs(
            packages=tuple(dict.fromkeys(name for part in needs for name in part.packages)),
            weights=tuple(dict.fromkeys(weights for part in needs for weights in part.weights)),
            install=" ".join(dict.fromkeys(part.requirements() for part in needs if part.absent_packages())),
        )

    @classmethod
    def takes_for(cls, options: Mapping[str, Any]) -> Takes:
        """Everything that the parts take."""
        parts = _parts(options.get("parts")).items()
        takes = [takes_of(part.reward, f"parts.{label}", part.options) for label, part in parts]
        return Takes(
            clips=any(part.clips for part in takes),
            references=any(part.references for part in takes),
            columns=tuple(dict.fromkeys(column for part in takes for column in part.columns)),
        )

    @classmethod
    def rehearse(cls, options: Mapping[str, Any]) -> None:
        """Whether each of the parts can be built."""
        for label, part in _parts(options.get("parts")).items():
            rehearse(part.reward, f"parts.{label}", part.options)

    def __init__(self, parts: Mapping[str, Any], device: str | None = None) -> None:
        self._parts: list[tuple[str, float, Reward]] = [
            (label, part.weight, build(part.reward, **{"device": device, **part.options}))
            for label, part in _parts(parts).items()
        ]
        self.takes_clips = any(takes_clips(reward) for _, _, reward in self._parts)
        self.takes_references = any(takes_references(reward) for _, _, reward in self._parts)
        if self.takes_clips:
            self._parts = [(label, weight, OfClips(reward)) for label, weight, reward in self._parts]

    def identity(self) -> dict[str, Any]:
        return {
            label: {"reward": reward.name, "weight": weight, **reward.identity()}
            for label, weight, reward in self._parts
        }

    def score(
        self,
        images: list[Any],
        prompts: list[str],
        metadata: Metadata | None = None,
        references: References | None = None,
    ) -> Tensor:
        """[B] float32."""
        asked = images, prompts, metadata, references
        scores = [weight * score_with(reward, *asked) for _, weight, reward in self._parts]
        return torch.stack(scores).sum(0)
