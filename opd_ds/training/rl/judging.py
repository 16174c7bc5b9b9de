"""A round's images and their rewards: what each is worth beside the others of its prompt."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ds.config.rl import GroupSection
from opd_ds.config.sections import WeightedReward
from opd_ds.data import Shard
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.evaluation.reward_pool import RewardPool
from opd_ds.training.meter import RoundMeter
from opd_ds.training.rl.advantages import equal_groups, group_advantages, weighted_sum
from opd_ds.training.rl.reward_worker import Asked, RewardScorer
from opd_ds.training.shares import TaskBatch

_SAID_AGAIN = 50  # rounds


@dataclass(frozen=True)
class Scored:
    """What the rewards of all ranks say of one task's samples.

    Attributes:
        advantages: float64 [samples], of all samples, unclipped.
        finite: bool [samples], whether a sample has a score.
        counts: of the samples that have a score, over all ranks, in each of the round's updates.
        summary: for the metrics, by name.
    """

    advantages: Tensor
    finite: Tensor
    counts: list[int]
    summary: dict[str, float]

    def advantages_of(self, part: Shard) -> Tensor:
        """Of a rank's samples: float64 [B]."""
        return self.advantages[torch.tensor(part.indices)]

    def weights(self, part: Shard) -> Tensor:
        """Of a rank's samples: float32 [B], 0 where one does not count."""
        return part.weights * self.finite[torch.tensor(part.indices)]


class GroupJudge:
    """Has images scored in the reward thread, and compares them over all ranks.

    Args:
        rewards: of each task.
    """

    def __init__(
        self, group: Group, pool: RewardPool, rewards: Mapping[str, Sequence[WeightedReward]], settings: GroupSection
    ) -> None:
        self._group, self._rewards, self._settings = group, rewards, settings
        self._scorer = RewardScorer(pool, settings.reward_attempts)
        self._equal_rounds: dict[str, int] = {}  # by task, up to now

    def submit(self, task: str, latents: Tensor, batch: TaskBatch, rows: slice) -> Future[Tensor]:
        """Have clean latents [b, C, ...] scored, those of the batch's `rows`; the scores are for `scored`. Ranks that
        share sequences have them scored between them.
        """
        start, each = self._group.own_rows.start, self._group.own_rows.step
        first = rows.start + (start - rows.start) % each
        own = slice(first, rows.stop, each)
        asked = Asked(batch.prompts[own], batch.metadata[own], batch.pictures[own])
        return self._scorer.submit(self._rewards[task], latents[first - rows.start :: each], asked)

    def scored(
        self, task: str, batches: list[TaskBatch], pending: list[list[Future[Tensor]]], meter: RoundMeter
    ) -> Scored:
        """Rewards of all ranks to what each sample is worth. Collective.

        Args:
            batches: all of the task.
            pending: of each batch, the scores of its consecutive parts.

        Raises:
            UserError: not one image of the round could be scored.
        """
        rewards = self._rewards[task]
        under_way = [future for one in pending for future in one]
        mine = RewardScorer.collect(under_way, lambda: meter.heartbeat(f", waiting for the rewards of {task}"))
        parts, own_rows = [batch.part for batch in batches], self._group.own_rows
        scores = torch.full((parts[0].total, len(rewards)), torch.nan, dtype=torch.float64)
        # A sample that only pads a rank's part is another rank's too, and counts there.
        own = torch.cat([part.weights[own_rows] for part in parts]) > 0
        indices = torch.cat([torch.tensor(part.indices)[own_rows] for part in parts])
        for places, values in self._group.gather((indices[own], mine[own])):
            scores[places] = values
        total = weighted_sum(scores, [reward.weight for reward in rewards], self._settings.reward_scale)
        finite = torch.isfinite(total)
        counts = finite.view(batches[0].updates, -1).sum(1).tolist()
        if not all(counts):
            images = f"{len(total) // len(counts)} images" + (" of an update" if len(counts) > 1 else "")
            raise UserError(
                f"round {meter.round_number}: the rewards of task {task} scored none of its {images} in "
                f"{self._settings.reward_attempts} attempts (see the log above); the last checkpoint is intact, go "
                "on with --resume auto when they work again"
            )
        good = total[finite]
        group = self._settings.group
        equal = equal_groups(total, group)
        self._say_what_teaches_nothing(task, meter.round_number, all_equal=equal * group == len(total))
        summary = {
            f"{task}/mean": float(good.mean()),
            f"{task}/std": float(good.std(correction=0)),
            f"{task}/left_out": float(len(total) - len(good)),
            f"{task}/equal_groups": float(equal),
        }
        for reward, column in zip(rewards, scores.T, strict=True):
            summary[f"{task}/{reward.label}"] = float(column.nanmean())
        advantages = group_advantages(total, group, self._settings.advantage_std)
        return Scored(advantages, finite, counts, summary)

    def _say_what_teaches_nothing(self, task: str, round_number: int, *, all_equal: bool) -> None:
        """At the first of several rounds in a row, and now and then after that."""
        before = self._equal_rounds.get(task, 0)
        self._equal_rounds[task] = before + 1 if all_equal else 0
        if all_equal and before % _SAID_AGAIN == 0 and self._group.world.is_main:
            logging.getLogger("opd_ds").warning(
                "round %d: task %s: the images of each prompt have equal rewards, so nothing is learned from them "
                "(%d rounds in a row); can %s tell such images apart?",
                round_number, task, before + 1, " + ".join(one.label for one in self._rewards[task]),
            )  # fmt: skip
