"""Rewards that are learned from: the images of one micro-batch are scored while the next one is rolled out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_ds.config.sections import WeightedReward
from opd_ds.evaluation.reward_pool import RewardPool
from opd_ds.rewards import Drawn, score_beside
from opd_ds.utils.pictures import Picture

_WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class Asked:
    """What belongs to each of some images: prompt, metadata and reference pictures."""

    prompts: list[str]
    metadata: list[dict[str, Any]]
    pictures: list[tuple[Picture, ...]]

    def select(self, rows: list[int]) -> Asked:
        return Asked(
            [self.prompts[row] for row in rows],
            [self.metadata[row] for row in rows],
            [self.pictures[row] for row in rows],
        )


class RewardScorer:
    """Decodes and scores in the reward thread.

    A call that fails is repeated, after a pause that doubles. Images that have no score then, by any one of the task's
    rewards, have none: NaN, never 0.

    Args:
        attempts: calls in all.
        pause: seconds before the second of them.
    """

    def __init__(self, pool: RewardPool, attempts: int, pause: float = 1.0) -> None:
        self._pool, self._attempts, self._pause = pool, attempts, pause

    def submit(self, rewards: Sequence[WeightedReward], latents: Tensor, asked: Asked) -> Future[Tensor]:
        """Scores float64 [B, rewards], as the rewards give them."""
        if len(latents) == 0:
            nothing: Future[Tensor] = Future()
            nothing.set_result(torch.empty(0, len(rewards), dtype=torch.float64))
            return nothing
        return self._pool.submit(self._score_all, rewards, latents, asked)

    @staticmethod
    def collect(pending: list[Future[Tensor]], waiting: Callable[[], None]) -> Tensor:
        """The scores of consecutive parts; calls `waiting` whenever one has arrived: a reward that hangs is a hang."""
        finished = -1
        while (state := wait(pending, timeout=_WAIT_SECONDS)).not_done:
            if len(state.done) > finished:
                finished = len(state.done)
                waiting()
        return torch.cat([part.result() for part in pending])

    def _score_all(self, rewards: Sequence[WeightedReward], latents: Tensor, asked: Asked) -> Tensor:
        images = self._pool.drawn(latents)
        return torch.stack([self._score(reward.label, images, asked) for reward in rewards], dim=1)

    def _score(self, label: str, images: list[Drawn], asked: Asked) -> Tensor:
        """Only what has no score yet is asked again."""
        scores = torch.full((len(images),), torch.nan, dtype=torch.float64)
        for attempt in range(self._attempts):
            left = (~torch.isfinite(scores)).nonzero().flatten().tolist()
            if not left:
                break
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1))
            try:
                some, reward = asked.select(left), self._pool.rewards[label]
                shown = [images[i] for i in left]
                found = score_beside(reward, shown, some.prompts, some.metadata, some.pictures)
                if found.shape != (len(left),):
                    raise ValueError(f"{len(left)} images got scores of shape {tuple(found.shape)}")
            except Exception:  # whatever a reward raises, a server that is away included: another attempt, then a gap
                logging.getLogger("opd_ds").exception(
                    "reward %s failed on %d images, attempt %d of %d", label, len(left), attempt + 1, self._attempts
                )
                continue
            scores[left] = found.double()
        return scores
