"""What a round was seen to be before its turn (`scoring.late`): it waits in memory and in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from opd_ds.engine import WAITING, Group, ShardReader
from opd_ds.training.buffer import Column, Columns, PerPair, PerSample, PerState, TrajectoryBuffer
from opd_ds.training.remote_teachers import ArrivingPairs
from opd_ds.training.shares import Share, TaskBatch
from opd_ds.training.trainer import Experience, TrainingData
from opd_ds.utils.transfer import to_device

Known = TypeVar("Known")

_COLUMNS: dict[str, type[PerState] | type[PerPair] | type[PerSample]] = {
    kind.__name__: kind for kind in (PerState, PerPair, PerSample)
}


class WaitingRound(Generic[Known]):
    """The experience of the next round. It belongs to a run's state, as the weights that drew it are gone.

    A checkpoint holds it sample by sample, so it goes on on any number of ranks. Prompts and trained steps are named by
    the round and are drawn again.

    Args:
        draw: the batches of a round. Collective.
        buffer: of the states that a batch has visited.
        known: what the loss takes.
    """

    kind = WAITING

    def __init__(
        self,
        draw: Callable[[int], dict[Share, TaskBatch]],
        buffer: Callable[[Share, Tensor, TaskBatch], TrajectoryBuffer],
        known: Callable[..., Known],
        group: Group,
    ) -> None:
        self._draw, self._buffer, self._known, self._group = draw, buffer, known, group
        self._round: int | None = None
        self._seen: Experience[Known] | None = None

    def put(self, index: int, seen: Experience[Known]) -> None:
        """Keep what round `index` will train on."""
        self._round, self._seen = index, seen

    def take(self, index: int) -> Experience[Known] | None:
        """What was kept for round `index`, which is let go; None where nothing was."""
        seen = self._seen if self._round == index else None
        self._round = self._seen = None
        return seen

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's samples, as entries of `opd_ds.engine.state`: a row of a column is a stretch of it."""
        entries: dict[str, Tensor] = {}
        for share, name, column in self._columns() if self._group.is_first else ():
            part = self._of(share).part
            rows = column.by_sample(len(part))
            for index, weight, row in zip(part.indices, part.weights.tolist(), rows, strict=True):
                if weight > 0:  # else another rank's, too
                    key = f"{WAITING}/{index * row.numel()}/{_place(share)}/{name}"
                    entries[key] = row.flatten().to("cpu", copy=True)
        return entries

    def scalar_state(self) -> dict[str, Any]:
        """The round, what rewards said of it, and the form of a sample in every column of a task: the lengths before
        those of a latent, which may be another on other ranks, and whether these follow.
        """
        columns: dict[str, dict[str, Any]] = {}
        for share, name, column in self._columns():
            batch = self._of(share)
            rows, latent = column.by_sample(len(batch.part)), batch.noise.shape
            ends = tuple(rows.shape[-len(latent) :]) == latent
            lengths = rows.shape[1 : -len(latent)] if ends else rows.shape[1:]
            dtype = str(rows.dtype).removeprefix("torch.")
            columns.setdefault(share.task, {})[name] = [type(column).__name__, dtype, ends, *lengths]
        scores = {} if self._seen is None else self._seen.scores
        return {"round": self._round, "columns": columns, "scores": scores}

    def load_state_dict(self, shards: ShardReader, scalars: dict[str, Any]) -> None:
        """Go on from a checkpoint, whatever ranks wrote it. Collective."""
        self._round = self._seen = None
        if scalars["round"] is None:
            return
        batches = self._draw(scalars["round"])
        data, final = {}, {}
        for share, batch in batches.items():
            columns: dict[str, PerState | PerPair | PerSample] = {
                name: self._read(shards, f"{_place(share)}/{name}", batch, *form)
                for name, form in scalars["columns"][share.task].items()
            }
            states = columns.pop("states").values
            if "final" in columns:
                final[share] = columns.pop("final").values
            data[share] = TrainingData(self._buffer(share, states, batch), Columns(self._known, columns), batch.pairs)
        self.put(scalars["round"], Experience(batches, data, final, scalars["scores"]))

    def _columns(self) -> Iterator[tuple[Share, str, Column]]:
        """Share, name and values of all that a checkpoint keeps."""
        if self._seen is None:
            return
        for share, one in self._seen.data.items():
            known = {
                name: column.arrived() if isinstance(column, ArrivingPairs) else column
                for name, column in one.known.columns.items()
            }
            kept: dict[str, Column] = {"states": PerState(one.buffer.states), **known}
            if share in self._seen.final:
                kept["final"] = PerSample(self._seen.final[share])
            for name, column in kept.items():
                yield share, name, column

    def _of(self, share: Share) -> TaskBatch:
        assert self._seen is not None
        return self._seen.batches[share]

    def _read(
        self, shards: ShardReader, name: str, batch: TaskBatch, kind: str, dtype: str, ends: bool, *lengths: int
    ) -> PerState | PerPair | PerSample:
        shape = (*lengths, *batch.noise.shape) if ends else lengths
        size = math.prod(shape)
        rows = [shards.read(WAITING, name, index * size, size).reshape(shape) for index in batch.part.indices]
        values = torch.stack(rows).to(getattr(torch, dtype))  # read as float32, which holds them all
        return _COLUMNS[kind].of_samples(to_device(values, self._group.device))


def _place(share: Share) -> str:
    """Samples of one task and size have rows of one length, whichever update trains on them."""
    return f"{share.task}/{share.size}"
