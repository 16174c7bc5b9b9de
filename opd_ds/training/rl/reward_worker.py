"""Rewards that are learned from: a worker judges the pictures of one micro-batch while the next one is rolled out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from opd_ds.config.rl import WeightedReward
from opd_ds.evaluation.pictures import to_image
from opd_ds.rewards import Reward

_WAIT_SECONDS = 10.0


class Judge:
    """Decodes and judges in a thread of its own.

    A call that fails is repeated, after a pause that doubles. Pictures that have no score then, by any one of the
    task's rewards, have none: NaN, never 0.

    Args:
        rewards: by label.
        decode: latents [B, C, ...] to pictures [B, 3, H, W] in [0, 1].
        attempts: calls in all.
    """

    def __init__(
        self, rewards: dict[str, Reward], decode: Callable[[Tensor], Tensor], attempts: int, pause: float = 1.0
    ) -> None:
        self._rewards, self._decode, self._attempts, self._pause = rewards, decode, attempts, pause
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    def submit(
        self, asked: Sequence[WeightedReward], latents: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Future[Tensor]:
        """Scores float64 [B, rewards], as the rewards give them."""
        return self._worker.submit(self._judge, asked, latents, prompts, metadata)

    @staticmethod
    def collect(pending: list[Future[Tensor]], waiting: Callable[[], None]) -> Tensor:
        """The scores of consecutive parts; calls `waiting` whenever one has arrived: a reward that hangs is a hang."""
        finished = -1
        while (state := wait(pending, timeout=_WAIT_SECONDS)).not_done:
            if len(state.done) > finished:
                finished = len(state.done)
                waiting()
        return torch.cat([part.result() for part in pending])

    def _judge(
        self, asked: Sequence[WeightedReward], latents: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor:
        images = [to_image(picture) for picture in self._decode(latents).cpu()]
        return torch.stack([self._score(reward.label, images, prompts, metadata) for reward in asked], dim=1)

    def _score(
        self, label: str, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor:
        """Only what has no score yet is asked again."""
        scores = torch.full((len(images),), torch.nan, dtype=torch.float64)
        for attempt in range(self._attempts):
            left = (~torch.isfinite(scores)).nonzero().flatten().tolist()
            if not left:
                break
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1))
            try:
                found = self._rewards[label].score(
                    [images[i] for i in left], [prompts[i] for i in left], [metadata[i] for i in left]
                )
                if found.shape != (len(left),):
                    raise ValueError(f"{len(left)} pictures got scores of shape {tuple(found.shape)}")
            except Exception:  # whatever a reward raises, a server that is away included: another attempt, then a gap
                logging.getLogger("opd_ds").exception(
                    "reward %s failed on %d pictures, attempt %d of %d", label, len(left), attempt + 1, self._attempts
                )
                continue
            scores[left] = found.double()
        return scores
