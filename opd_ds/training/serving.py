"""A rank that holds teachers (`scoring.ranks`): it answers the ranks that train, and does nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd_ds.cluster.roles import Answering
from opd_ds.engine import Group, Inbox, Outbox
from opd_ds.models import Conditioning, ModelFamily, guide
from opd_ds.training.auto_batch import AutoMicroBatch
from opd_ds.training.questions import Call, End, Prompts, Question, is_end
from opd_ds.training.teachers import TeacherPool
from opd_ds.utils.transfer import moved, to_device, to_host


@dataclass
class _Student:
    """A rank that asks."""

    rank: int
    inbox: Inbox
    prompts: Prompts | None = None


class TeacherServer:
    """Answers until the ranks that train have no more questions.

    All its students ask the same in the same order, each about its own states. It takes one question of each, and their
    rows together where they are alike. Where networks are sharded, every teacher rank comes to the same question in the
    same order, and makes as many forwards for it as the one with most rows.

    Args:
        group: the ranks that hold teachers.
        scoring: rows per forward.
    """

    def __init__(
        self, group: Group, family: ModelFamily, teachers: TeacherPool, answering: Answering, scoring: AutoMicroBatch
    ) -> None:
        assert group.channel is not None
        self._group, self._family, self._teachers, self._scoring = group, family, teachers, scoring
        self._sharded = answering.sharded and group.world.size > 1
        ranks = answering.answered(group.world.rank)
        self._students = [_Student(rank, Inbox(group.channel, rank, is_end)) for rank in ranks]
        self._outbox = Outbox(group.channel)

    @torch.no_grad()
    def serve(self) -> int | None:
        """Until the end; returns the code to leave with, where all ranks were asked to stop. Collective where networks
        are sharded.
        """
        while True:
            self._group.progress("waiting for states")
            messages = {student.rank: student.inbox.get() for student in self._students}
            first = next(iter(messages.values()))
            self._group.progress("asking teachers")
            if isinstance(first, End):
                for rank in messages:
                    self._outbox.put(partial(End, first.code), rank)
                self._outbox.close()
                return first.code
            if isinstance(first, Prompts):
                for student in self._students:
                    student.prompts = self._on_device(messages[student.rank])
            elif isinstance(first, Call):
                self._call(messages)
            else:
                self._answer(messages)

    def _on_device(self, prompts: Prompts) -> Prompts:
        device = self._group.device
        return Prompts({share: cond.to(device) for share, cond in prompts.cond.items()}, prompts.uncond.to(device))

    def _call(self, calls: Mapping[int, Call]) -> None:
        first = next(iter(calls.values()))
        rounds = [*calls.items()]
        if self._sharded:  # a rank with fewer students repeats a call, as the others wait for its shard
            most = max(self._group.gather(len(rounds)))
            rounds += [(-1, rounds[0][1])] * (most - len(rounds))
        with self._teachers.active(first.network) as network:
            for rank, call in rounds:
                answer = network(**moved(call.inputs, self._group.device))
                if rank >= 0:
                    self._outbox.put(partial(moved, answer, torch.device("cpu")), rank)

    def _answer(self, questions: Mapping[int, Question]) -> None:
        first = next(iter(questions.values()))
        parts = self._together(questions)
        if self._sharded:
            forwards = sum(-(-len(batch) // (self._scoring.size or len(batch))) for batch in parts)
            parts += [self._filler(first)] * (max(self._group.gather(forwards)) - forwards)
        with self._teachers.active(first.network) as network:
            for batch in parts:
                said = torch.cat(self._scoring.run(len(batch), partial(self._ask, network, first, batch)))
                for rank, rows in batch.of.items():
                    self._outbox.put(to_host(said[rows]), rank)

    def _together(self, questions: Mapping[int, Question]) -> list[_Batch]:
        """The rows of all students, where they can be in one forward: another image size cannot, nor do pictures."""
        found: list[_Batch] = []
        for student in self._students:
            question, prompts = questions[student.rank], student.prompts
            assert prompts is not None
            if not question.rows:
                continue
            index = to_device(torch.tensor(question.rows), self._group.device)
            cond = prompts.cond[question.share].select(index, question.rows)
            states = to_device(question.states, self._group.device)
            batch = _Batch(states, question.sigma, cond, prompts.uncond, {student.rank: slice(0, len(states))})
            if found and found[-1].is_like(batch):
                found[-1] = found[-1].joined(batch)
            else:
                found.append(batch)
        return found

    def _filler(self, question: Question) -> _Batch:
        """One row of the same shapes, for a forward that other ranks need."""
        prompts = self._students[0].prompts
        assert prompts is not None
        states = torch.ones(1, *question.states.shape[1:], dtype=question.states.dtype, device=self._group.device)
        return _Batch(states, question.sigma, prompts.cond[question.share][:1], prompts.uncond, {})

    def _ask(self, network: Any, question: Question, batch: _Batch, rows: slice) -> Tensor:
        cond, states = batch.cond[rows], batch.states[rows]
        sigma = torch.full((len(states),), batch.sigma, dtype=torch.float32, device=states.device)
        uncond = batch.uncond if cond.negative is None else cond.negative
        said = guide(self._family, network, states, sigma, cond, uncond, question.guidance, question.stage)
        if not question.apart:
            return said.velocity
        assert said.branches is not None
        return torch.cat([said.velocity[:, None], said.branches], 1)


@dataclass(frozen=True)
class _Batch:
    """Rows of several students.

    Attributes:
        of: whose they are, by rank.
    """

    states: Tensor
    sigma: float
    cond: Conditioning
    uncond: Conditioning
    of: dict[int, slice]

    def __len__(self) -> int:
        return len(self.states)

    def is_like(self, other: _Batch) -> bool:
        plain = not self.cond.references and not other.cond.references
        return plain and self.states.shape[1:] == other.states.shape[1:]

    def joined(self, other: _Batch) -> _Batch:
        count = len(self)
        of = {rank: slice(count + rows.start, count + rows.stop) for rank, rows in other.of.items()}
        return replace(
            self,
            states=torch.cat([self.states, other.states]),
            cond=Conditioning.cat([self.cond, other.cond]),
            of=self.of | of,
        )
