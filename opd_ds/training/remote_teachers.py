"""Teachers on ranks of their own (`scoring.ranks`), as a rank that trains sees them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd_ds.cluster.roles import Answering, Roles
from opd_ds.engine import Channel, Group, Outbox
from opd_ds.models import Conditioning
from opd_ds.training.buffer import Pairs, PerPair
from opd_ds.training.questions import Call, End, Prompts, Question
from opd_ds.training.shares import Share
from opd_ds.training.teachers import TeacherSpec, networks_of
from opd_ds.utils.transfer import moved, to_device, to_host


class RemoteTeachers:
    """Asks teacher ranks; nothing here waits before an answer is used.

    Every rank that trains asks the same questions in the same order, so that a teacher rank can take one of each. What
    it asks leaves in a thread as soon as the device has computed it, and answers arrive in threads.
    """

    def __init__(self, group: Group, specs: dict[str, TeacherSpec]) -> None:
        assert group.channel is not None
        self._group, self._specs, self._channel = group, specs, group.channel
        self._answering = answering(specs, group.roles)
        self._network = {name: number for number, names in enumerate(networks_of(specs)) for name in names}
        self._outbox = Outbox(group.channel)
        ranks = sorted({self._rank(name) for name in specs})
        self._answers = {rank: _Answers(group.channel, rank) for rank in ranks}

    @property
    def device(self) -> torch.device:
        """Where answers are wanted."""
        return self._group.device

    def guidance(self, task: str) -> float:
        return self._specs[task].settings.guidance

    def begin(
        self, asked: Mapping[Share, Iterable[str]], cond: Mapping[Share, Conditioning], uncond: Conditioning
    ) -> None:
        """The questions of a round follow, of these shares to these networks."""
        for rank in self._answers:
            wanted = [share for share, names in asked.items() if any(self._rank(name) == rank for name in names)]
            host = torch.device("cpu")
            own = {share: cond[share].to(host) for share in wanted}
            self._outbox.put(partial(Prompts, own, uncond.to(host)), rank)

    def ask(self, question: Question) -> Future[Tensor]:
        """The answer to come, on the host; the states may still be computed. To be called for no rows, too."""
        rank = self._rank(question.network)
        states = to_host(question.states)
        self._outbox.put(partial(_with_states, question, states), rank)
        return self._answers[rank].next() if question.rows else _nothing()

    @contextmanager
    def drawing(self, task: str) -> Iterator[Any]:
        """The task's network, to be asked without a gradient: each forward goes over and comes back."""
        rank, device = self._rank(task), self.device

        def forward(**inputs: Any) -> Any:
            self._outbox.put(partial(Call, task, moved(inputs, torch.device("cpu"))), rank)
            return moved(self._answers[rank].next().result(), device)

        yield forward

    def end(self, code: int | None = None) -> None:
        """There are no more questions; `code`: with which all ranks leave. Returns when teacher ranks have heard."""
        for rank in self._answers:
            self._outbox.put(partial(End, code), rank)
        self._outbox.close()
        for answers in self._answers.values():
            answers.next().result()
            answers.close()

    def _rank(self, name: str) -> int:
        """In the launch, of the teacher rank that this rank asks."""
        asked = self._answering.asked(self._network[name], self._group.world.rank)
        return self._group.roles.students + asked


def answering(specs: Mapping[str, TeacherSpec], roles: Roles) -> Answering:
    """Which teacher rank answers whom."""
    sharded = any(spec.settings.placement == "zero_inference" for spec in specs.values())
    return Answering(len(networks_of(specs)), roles.teachers, roles.students, sharded)


class _Answers:
    """A thread that receives a teacher rank's answers: to the questions in their order."""

    def __init__(self, channel: Channel, source: int) -> None:
        self._channel, self._source = channel, source
        self._open: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=f"answers of rank {source}", daemon=True).start()

    def next(self) -> Future[Any]:
        """The answer to the next question."""
        answer: Future[Any] = Future()
        self._open.put(answer)
        return answer

    def close(self) -> None:
        self._open.put(None)

    def _run(self) -> None:
        error: Exception | None = None
        while (answer := self._open.get()) is not None:
            if error is None:
                try:
                    answer.set_result(self._channel.receive(self._source))
                    continue
                except Exception as broken:
                    error = broken
            answer.set_exception(error)


def _with_states(question: Question, states: Callable[[], Tensor]) -> Question:
    return replace(question, states=states())


def _nothing() -> Future[Tensor]:
    answer: Future[Tensor] = Future()
    answer.set_result(torch.empty(0))
    return answer


class Arrival:
    """A network's answers about one share, as they come.

    Args:
        count: of the share's pairs.
        device: where they are wanted.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device = count, device
        self._part_of = torch.zeros(count, dtype=torch.int64)
        self._coming: list[tuple[Tensor, Future[Tensor]]] = []
        self._arrived = 0
        self._values: Tensor | None = None

    def add(self, places: Tensor, answer: Future[Tensor]) -> None:
        """An answer about the pairs at `places` int64 [p], on the host."""
        if len(places):
            self._part_of[places] = len(self._coming)
            self._coming.append((places, answer))

    @property
    def order(self) -> Tensor:
        """The pairs' places in the order in which they were asked about: int64 [P], on the host."""
        return torch.cat([places for places, _ in self._coming])

    def upto(self, places: slice | Tensor) -> Tensor:
        """Answers [P, ...], those at `places` (on the host) being there; waits for them."""
        last = int(self._part_of[places].max())
        while self._arrived <= last:
            where, answer = self._coming[self._arrived]
            said = to_device(answer.result(), self._device)
            if self._values is None:
                self._values = said.new_empty(self._count, *said.shape[1:])
            self._values.index_copy_(0, to_device(where, self._device), said)
            self._arrived += 1
        assert self._values is not None
        return self._values


@dataclass(frozen=True)
class ArrivingPairs:
    """`PerPair` of which some are still on their way; `column`: of an answer with several velocities, which."""

    arrival: Arrival
    column: int | slice | None = None

    def at(self, pairs: Pairs) -> Tensor:
        values = self.arrival.upto(pairs.host_rows)
        return self._chosen(values[pairs.rows])

    def arrived(self) -> PerPair:
        """When all are there."""
        return PerPair(self._chosen(self.arrival.upto(slice(None))))

    def by_sample(self, count: int) -> Tensor:
        return self.arrived().by_sample(count)

    def _chosen(self, values: Tensor) -> Tensor:
        return values if self.column is None else values[:, self.column]
