"""Which ranks train the student, which of them share sequences (`model.sequence_parallel`), and which hold teachers
(`scoring.ranks`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opd_ds.cluster.world import World
from opd_ds.errors import UserError


@dataclass(frozen=True)
class Roles:
    """All ranks of a launch: the first train, the last `teachers` of them hold teachers.

    Attributes:
        world: this process among all of them.
        sharing: how many ranks that train share each sequence: neighbours, which have the same samples.

    Raises:
        UserError: nobody would train, or ranks that train are left over.
    """

    world: World
    teachers: int = 0
    sharing: int = 1

    def __post_init__(self) -> None:
        if self.teachers and self.teachers >= self.world.size:
            raise UserError(
                f"scoring.ranks = {self.teachers}: the run has {self.world.size} "
                f"rank{'s' if self.world.size > 1 else ''}, and at least one has to train; allowed are 0 to "
                f"{self.world.size - 1}"
            )
        if self.students % self.sharing:
            allowed = [str(ranks) for ranks in range(1, self.students + 1) if self.students % ranks == 0]
            raise UserError(
                f"model.sequence_parallel = {self.sharing} does not divide the ranks that train, {self.students}; "
                f"allowed: {', '.join(allowed)}"
            )

    @property
    def students(self) -> int:
        """How many ranks train; they are the first."""
        return self.world.size - self.teachers

    @property
    def is_teacher(self) -> bool:
        return self.world.rank >= self.students

    @property
    def own(self) -> World:
        """This process among the ranks of its role."""
        return self._among(self.teachers, self.students) if self.is_teacher else self._among(self.students, 0)

    @property
    def training(self) -> World:
        """The ranks that train, as one of them is told; a teacher rank is none of them, and not the main one either."""
        return self._among(self.students, 0)

    @property
    def drawing(self) -> World:
        """The ranks that train, those that share sequences as one: what samples are divided over."""
        own, sharing = self.training, self.sharing
        if sharing == 1:
            return own
        return replace(own, rank=own.rank // sharing, size=own.size // sharing)

    def _among(self, size: int, before: int) -> World:
        if size == self.world.size:
            return self.world
        return replace(
            self.world, rank=self.world.rank - before, size=size, local_size=min(self.world.local_size, size)
        )


@dataclass(frozen=True)
class Answering:
    """Which teacher ranks, counted from 0, answer which student ranks.

    Every student rank asks the same questions in the same order, and the students of a teacher rank ask all of its
    networks, so a teacher rank knows whose questions come next.

    Attributes:
        networks: how many separate networks teachers are.
        sharded: each of them lies on all teacher ranks together, and its forwards are collective.
    """

    networks: int
    teachers: int
    students: int
    sharded: bool = False

    def holders(self, network: int) -> list[int]:
        """The teacher ranks that hold a network: whole where it is not sharded."""
        if self.sharded:
            return list(range(self.teachers))
        if self.teachers <= self.networks:
            return [network % self.teachers]
        return list(range(network, self.teachers, self.networks))

    def asked(self, network: int, student: int) -> int:
        """The teacher rank that answers a student rank for a network."""
        holders = self.holders(network)
        return holders[student % len(holders)]

    def held(self, teacher: int) -> list[int]:
        """The networks on a teacher rank."""
        return [network for network in range(self.networks) if teacher in self.holders(network)]

    def answered(self, teacher: int) -> list[int]:
        """The student ranks that a teacher rank answers."""
        networks = self.held(teacher)
        return [
            student
            for student in range(self.students)
            if any(self.asked(network, student) == teacher for network in networks)
        ]

    def check(self) -> None:
        """Raise UserError where a teacher rank would have nothing to do."""
        idle = [teacher for teacher in range(self.teachers) if not self.answered(teacher)]
        if idle:
            most = self.teachers - len(idle)
            raise UserError(
                f"scoring.ranks = {self.teachers}: with {self.students} ranks that train and {self.networks} separate "
                f"networks to ask, {len(idle)} of them would have nothing to do; set it to {most} at most"
            )
