"""Rewards beside the training: a worker thread of rank 0 scores images while the next rounds run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Literal

import torch

from opd_ds.config.schema import RunConfig
from opd_ds.evaluation.evaluator import Shown, score_images, with_sum
from opd_ds.evaluation.pictures import Item
from opd_ds.evaluation.reward_pool import RewardPool
from opd_ds.rewards import Drawn
from opd_ds.training.trainer import RolloutResult

Source = Literal["held_out", "rollout"]


@dataclass(frozen=True)
class RewardRecord:
    """What one reward said of one task's images after a round; `mean` is over the `judged` images, else None."""

    round: int
    source: Source
    task: str
    label: str
    mean: float | None
    judged: int
    failed: int


@dataclass(frozen=True)
class _Pictures:
    source: Source
    task: str
    asked: list[Item]
    images: list[Drawn]


class AsyncRewardEval:
    """Takes images of a round and gives scores later. A round never waits for it.

    At most one evaluation runs and one waits: where rewards are slower than `watch.every` rounds, further ones
    are left out, with a line in the log, so that images do not pile up in memory.

    Args:
        pool: whose thread scores.
    """

    def __init__(self, config: RunConfig, pool: RewardPool) -> None:
        self._settings, self._pool = config.watch, pool
        self._labels = {
            name: [reward.label for reward in section.rewards] for name, section in config.evaluated.items()
        }
        self._summed = {name: section.summed for name, section in config.evaluated.items()}
        self._pending: list[Future[list[RewardRecord]]] = []

    def submit(self, done: int, rolled: dict[str, RolloutResult], held_out: dict[str, list[Shown]]) -> None:
        """Have round `done`'s own rollouts and its held-out images scored."""
        if sum(not future.done() for future in self._pending) > 1:
            logging.getLogger("opd_ds").warning(
                "round %d: the rewards are busy with earlier rounds, this evaluation is left out; raise watch.every",
                done,
            )
            return
        parts = [self._of_rollouts(done, task, drawn) for task, drawn in rolled.items() if self._labels[task]]
        parts += [self._of_held_out(task, shown) for task, shown in held_out.items()]
        self._pending.append(self._pool.submit(self._score, done, parts))

    def finished(self) -> list[RewardRecord]:
        """Scores that have arrived since the last call; does not wait."""
        ready = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if future not in ready]
        return [record for future in ready for record in future.result()]

    def close(self, waiting: Callable[[], None]) -> list[RewardRecord]:
        """The scores still under way; waits for them, and calls `waiting` now and then."""
        while wait(self._pending, timeout=10).not_done:
            waiting()
        return self.finished()

    def _of_rollouts(self, done: int, task: str, drawn: RolloutResult) -> _Pictures:
        """Decoded here, between two rounds, and one by one: in the thread it would take the training's memory."""
        count = min(self._settings.rollouts, len(drawn.prompts))
        asked = [Item(i, 0, drawn.prompts[i], drawn.metadata[i], i, drawn.pictures[i]) for i in range(count)]
        try:
            images = [self._pool.drawn(latents[None])[0] for latents in drawn.final[:count]]
        except Exception:  # a gap, not the end of the run
            logging.getLogger("opd_ds").exception("round %d: the images of task %s were not decoded", done, task)
            return _Pictures("rollout", task, [], [])
        return _Pictures("rollout", task, asked, images)

    @staticmethod
    def _of_held_out(task: str, shown: list[Shown]) -> _Pictures:
        return _Pictures("held_out", task, [item for item, _ in shown], [image for _, image in shown])

    def _score(self, done: int, parts: list[_Pictures]) -> list[RewardRecord]:
        records = []
        for part in parts:
            labels = self._labels[part.task]
            if not labels or not part.asked:
                continue
            found = {label: score_images(self._pool.rewards[label], label, part.images, part.asked) for label in labels}
            for label, scores in with_sum(found, self._summed[part.task]).items():
                good = scores[torch.isfinite(scores)]
                mean = float(good.mean()) if len(good) else None
                failed = len(scores) - len(good)
                records.append(RewardRecord(done, part.source, part.task, label, mean, len(good), failed))
        return records
