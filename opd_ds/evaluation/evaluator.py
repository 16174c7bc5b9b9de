"""Render held-out prompts with a model and let the tasks' rewards judge the pictures."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from opd_ds.config import RunConfig
from opd_ds.diffusion import kernel
from opd_ds.engine import Group
from opd_ds.models import ModelFamily, guided_velocity
from opd_ds.prompts import PromptSet, SampleNoise, Shard, sample_seed, shard
from opd_ds.rewards import Reward
from opd_ds.rollout import rollout


@dataclass(frozen=True)
class EvaluationResult:
    """Mean rewards over all ranks by task and label, and the first pictures per task."""

    scores: dict[str, dict[str, float]]
    pictures: dict[str, Tensor]
    prompts: dict[str, list[str]]


class Evaluator:
    """Every picture is seeded by (evaluation seed, task, index): models are compared on the same noise.

    Args:
        prompts: held-out prompts by task; tasks without are not evaluated.
        rewards: by label, as the tasks' settings name them.
    """

    def __init__(
        self,
        config: RunConfig,
        group: Group,
        family: ModelFamily,
        prompts: dict[str, PromptSet],
        rewards: dict[str, Reward],
    ) -> None:
        self._config, self._group, self._family = config, group, family
        self._prompts, self._rewards = prompts, rewards
        self._uncond = family.encode([config.model.negative_prompt])
        self._sigmas = family.sigmas(config.evaluation.steps)

    @property
    def tasks(self) -> list[str]:
        return list(self._prompts)

    def student_guidance(self) -> dict[str, float]:
        """The student's guidance on each evaluated task."""
        rollout_guidance = self._config.rollout.guidance
        own = {task: self._config.tasks[task].guidance for task in self._prompts}
        return {task: rollout_guidance if value is None else value for task, value in own.items()}

    def run(self, network: Any, guidance: dict[str, float], *, pictures_only: bool = False) -> EvaluationResult:
        """Evaluate `network` on every task that `guidance` names. Collective: every rank makes the same forwards.

        Args:
            pictures_only: render only the prompts of the grid and score nothing.
        """
        scores: dict[str, dict[str, float]] = {}
        shown: dict[str, Tensor] = {}
        count = self._config.evaluation.grid_prompts
        for task, value in guidance.items():
            prompts = self._prompts[task]
            total = (
                min(count, len(prompts)) if pictures_only else len(prompts) * self._config.evaluation.samples_per_prompt
            )
            if total == 0:
                continue
            part = shard(total, self._group.world.rank, self._group.world.size)
            pictures = self._render(network, task, part.indices, value)
            first = [(i, pictures[k]) for k, i in enumerate(part.indices) if i < count and part.weights[k] > 0]
            gathered = dict(pair for pairs in self._group.gather(first) for pair in pairs)
            shown[task] = torch.stack([gathered[i] for i in sorted(gathered)]) if gathered else torch.empty(0)
            if not pictures_only:
                images = [to_image(picture) for picture in pictures]
                scores[task] = {
                    reward.label: self._score(task, reward.label, images, part)
                    for reward in self._config.tasks[task].rewards
                }
        return EvaluationResult(scores, shown, {task: list(self._prompts[task].prompts[:count]) for task in guidance})

    @torch.no_grad()
    def _render(self, network: Any, task: str, indices: list[int], guidance: float) -> Tensor:
        """Pictures [B, 3, H, W]; index i is prompt i modulo the number of prompts."""
        settings, prompts = self._config.evaluation, self._prompts[task].prompts
        cond = self._family.encode([prompts[i % len(prompts)] for i in indices])
        seeds = [sample_seed(settings.seed, 0, f"evaluation/{task}", i) for i in indices]

        def predict(x: Tensor, sigma: Tensor, rows: slice, step: int) -> Tensor:
            return guided_velocity(self._family, network, x, sigma, cond[rows], self._uncond, guidance)

        noise = SampleNoise(seeds, self._family.latent_shape)
        device = self._group.device
        final = rollout(predict, noise, kernel("euler"), self._sigmas, micro_batch=settings.micro_batch, device=device)
        return torch.cat([self._family.decode(part).cpu() for part in final.final.split(settings.micro_batch)])

    def _score(self, task: str, label: str, images: list[Image.Image], part: Shard) -> float:
        prompts = self._prompts[task]
        rows = [i % len(prompts) for i in part.indices]
        texts, metadata = [prompts.prompts[i] for i in rows], [prompts.metadata[i] for i in rows]
        try:
            rewards = self._rewards[label].score(images, texts, metadata).double()
        except Exception:  # a reward only monitors: its failure, of whatever kind, is a gap in the log, not the end
            logging.getLogger("opd_ds").exception("reward %s failed on task %s; its score is missing", label, task)
            rewards = torch.full((len(images),), math.nan, dtype=torch.float64)
        judged = part.weights.double() * torch.isfinite(rewards)
        total, count = self._group.sum(torch.stack([(rewards.nan_to_num() * judged).sum(), judged.sum()])).tolist()
        return total / count if count else math.nan


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] to an 8-bit RGB picture."""
    array = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array)
