"""A round's states on their way to teacher ranks, and what comes back (`scoring.ranks`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from opd_ds.config.algorithms import DistilConfig
from opd_ds.diffusion.rollout import Told
from opd_ds.models import Conditioning, ModelFamily
from opd_ds.training.buffer import PerPair
from opd_ds.training.meter import RoundMeter
from opd_ds.training.questions import Question
from opd_ds.training.remote_teachers import Arrival, ArrivingPairs, RemoteTeachers
from opd_ds.training.shares import Sampler, Share, TaskBatch
from opd_ds.utils.transfer import to_device


@dataclass(frozen=True)
class Said:
    """What a frozen network said of a share's pairs: `guided` velocities, and what guidance made them of, where that
    is kept.
    """

    guided: PerPair | ArrivingPairs
    branches: PerPair | ArrivingPairs | None = None


class VisitedStates:
    """Asks for the velocities at a round's states as they are visited.

    Every rank asks as often, about no state where its samples have not chosen a step: a step is left out where none of
    the task's samples has, on any rank.
    """

    def __init__(
        self,
        teachers: RemoteTeachers,
        config: DistilConfig,
        family: ModelFamily,
        batches: Mapping[Share, TaskBatch],
        uncond: Conditioning,
        meter: RoundMeter,
    ) -> None:
        self._teachers, self._config, self._family = teachers, config, family
        self._batches, self._counter = batches, meter.part("score")
        asked = {share: config.asked(share.task) for share in batches}
        self._arrivals = {
            share: {name: Arrival(batch.chosen.numel(), teachers.device) for name in asked[share]}
            for share, batch in batches.items()
        }
        teachers.begin(asked, {share: batch.cond for share, batch in batches.items()}, uncond)

    def told(self, rows: Mapping[Share, slice], sampler: Sampler) -> Told:
        """What a rollout tells of its states.

        Args:
            rows: of each share, among those that are rolled out together.
        """

        def told(step: int, places: Tensor, states: Tensor) -> None:
            picks = next(iter(self._batches.values())).chosen.shape[1]
            samples = places // picks
            for share, own in rows.items():
                if not (self._batches[share].trained == step).any():
                    continue
                mine = ((samples >= own.start) & (samples < own.stop)).nonzero().flatten()
                there = states if len(mine) == len(places) else states[to_device(mine, states.device)]
                self._ask(share, step, places[mine] - own.start * picks, there, sampler)

        return told

    def _ask(self, share: Share, step: int, places: Tensor, states: Tensor, sampler: Sampler) -> None:
        rows = (places // self._batches[share].chosen.shape[1]).tolist()
        apart = self._config.kept_apart(share.task, self._family.passes)
        for name, guidance in self._config.asked(share.task).items():
            sigma, stage = float(sampler.sigmas[step]), sampler.stages[step]
            question = Question(name, share, guidance, name in apart, rows, states, sigma, stage)
            self._arrivals[share][name].add(places, self._teachers.ask(question))
            self._counter.count(len(rows), len(rows) * (self._family.passes(guidance) - 1))

    def order(self, share: Share) -> Tensor:
        """The share's pairs in the order in which they were visited: int64 [P], on the host."""
        return next(iter(self._arrivals[share].values())).order

    def said(self, share: Share) -> dict[str, Said]:
        """By network; it comes while others train."""
        apart = self._config.kept_apart(share.task, self._family.passes)
        return {
            name: Said(ArrivingPairs(arrival, 0), ArrivingPairs(arrival, slice(1, None)))
            if name in apart
            else Said(ArrivingPairs(arrival))
            for name, arrival in self._arrivals[share].items()
        }
