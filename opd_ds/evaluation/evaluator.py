"""Held-out scores and images in memory, to evaluate the student between rounds."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import WEIGHTED_SUM
from opd_ds.data import PromptSet
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.evaluation.pictures import Item, Painter, items
from opd_ds.evaluation.reward_pool import RewardPool
from opd_ds.rewards import Drawn, Reward, score_beside

# By task (or prompt set) and label.
Means = dict[str, dict[str, float]]


Shown = tuple[Item, Drawn]


@dataclass(frozen=True)
class EvaluationResult:
    """Mean rewards over all ranks, and the first images of each task."""

    scores: Means
    shown: dict[str, list[Shown]]


class Evaluator:
    """Scores a network on the tasks' held-out prompts; see `Painter` for the noise.

    Args:
        prompts: held-out prompts by task; tasks without are not evaluated.
        rewards: as the tasks' settings name them; the thread may have images of `watch` to score first.
    """

    def __init__(
        self,
        config: RunConfig,
        group: Group,
        painter: Painter,
        prompts: dict[str, PromptSet],
        rewards: RewardPool,
    ) -> None:
        self._config, self._group, self._painter = config, group, painter
        self._prompts, self._rewards = prompts, rewards

    @property
    def tasks(self) -> list[str]:
        return list(self._prompts)

    def run(self, network: Any, guidance: dict[str, float]) -> EvaluationResult:
        """Score `network` on every task that `guidance` names. Collective: every rank makes the same forwards."""
        settings = self._config.evaluation
        scores: Means = {}
        shown: dict[str, list[Shown]] = {}
        for task, value in guidance.items():
            wanted = items(self._prompts[task], settings.samples_per_prompt)
            mine, images, weights = self._draw(network, wanted, value)
            shown[task] = self._gather(mine, images, settings.grid_prompts)
            section = self._config.evaluated[task]
            labels = [reward.label for reward in section.rewards]
            found = {label: self._score(label, images, mine) for label in labels}
            found = with_sum(found, section.summed)
            scores[task] = {label: self._mean(values, weights) for label, values in found.items()}
        return EvaluationResult(scores, shown)

    def draw(self, network: Any, guidance: dict[str, float], count: int) -> dict[str, list[Shown]]:
        """The images of the first `count` held-out prompts of each task, on every rank, without scores. Collective."""
        shown = {}
        for task, value in guidance.items():
            wanted = items(self._prompts[task], 1, count)
            if wanted:
                mine, images, _ = self._draw(network, wanted, value)
                shown[task] = self._gather(mine, images, count)
        return shown

    def _score(self, label: str, images: list[Drawn], asked: list[Item]) -> Tensor:
        return self._rewards.submit(score_images, self._rewards.rewards[label], label, images, asked).result()

    def _draw(self, network: Any, wanted: list[Item], guidance: float) -> tuple[list[Item], list[Drawn], Tensor]:
        """This rank's items, their images and their weights."""
        drawn = list(self._painter.draw(network, wanted, guidance))
        mine, images = [item for item, _, _ in drawn], [image for _, image, _ in drawn]
        return mine, images, torch.tensor([weight for _, _, weight in drawn])

    def _gather(self, mine: list[Item], images: list[Drawn], count: int) -> list[Shown]:
        first = {item.number: (item, image) for item, image in zip(mine, images, strict=True)
                 if item.sample == 0 and item.number < count}  # fmt: skip
        gathered = {number: shown for part in self._group.gather(first) for number, shown in part.items()}
        return [gathered[number] for number in sorted(gathered)]

    def _mean(self, scores: Tensor, weights: Tensor) -> float:
        """Over the images that have a score; padding samples have weight 0."""
        counted = weights.double() * torch.isfinite(scores)
        total, count = self._group.sum(torch.stack([(scores.nan_to_num() * counted).sum(), counted.sum()])).tolist()
        return total / count if count else math.nan


def student_guidance(config: RunConfig, tasks: list[str]) -> dict[str, float]:
    """The student's guidance on each of `tasks`; a name that is no task gets the rollout's."""
    evaluated = config.evaluated
    own = {task: evaluated[task].guidance if task in evaluated else None for task in tasks}
    return {task: config.rollout.guidance if value is None else value for task, value in own.items()}


def score_images(reward: Reward, label: str, images: list[Drawn], asked: list[Item]) -> Tensor:
    """Scores [B], float64, of images or clips. A reward that fails in any way is a gap: NaN, and in the log."""
    if not images:  # of ranks that share sequences one may have none
        return torch.empty(0, dtype=torch.float64)
    try:
        prompts, metadata = [item.prompt for item in asked], [item.metadata for item in asked]
        scores = score_beside(reward, images, prompts, metadata, [item.pictures for item in asked])
        if scores.shape != (len(images),):
            raise ValueError(f"{len(images)} images got scores of shape {tuple(scores.shape)}")
        return scores.double()
    except UserError as error:  # says by itself what is wrong
        logging.getLogger("opd_ds").error("%d images have no score by %s: %s", len(images), label, error)
    except Exception:  # a reward only monitors: it must not end the run or the evaluation it watches
        logging.getLogger("opd_ds").exception("reward %s failed on %d images; they have no score", label, len(images))
    return torch.full((len(images),), math.nan, dtype=torch.float64)


def with_sum(scores: dict[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Scores [B] by label, first their weighted sum where `weights` has any: NaN where one of its parts is."""
    if not weights:
        return scores
    total = torch.stack([weight * scores[label] for label, weight in weights.items()]).sum(0)
    return {WEIGHTED_SUM: total, **scores}
