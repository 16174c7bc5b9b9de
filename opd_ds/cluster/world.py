"""Who am I: rank, world size and rendezvous of this process, before anything heavy is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from opd_ds.errors import UserError, shown

LOCALHOST = "127.0.0.1"
JOB_VARIABLE = "SLURM_JOB_ID"


@dataclass(frozen=True)
class World:
    """This process among all processes of the run.

    Attributes:
        master_addr: host of rank 0.
        master_port: where its store listens; None: the ranks have yet to agree, along `rendezvous.ports(job)`.
        job: a name all ranks share, different from that of any other run at the same time.
        told_by: the variables without which this process would run alone.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    master_addr: str = LOCALHOST
    master_port: int | None = None
    job: str = ""
    told_by: str = field(default="", compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class _Claim:
    """What one source says."""

    source: str
    rank: int
    local_rank: int
    size: int
    local_size: int
    nodes: int = 1


# What to unset so that a source says nothing.
_UNSET = {
    "RANK": "RANK LOCAL_RANK WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_RANK",
    "SLURM_PROCID": "SLURM_STEP_ID",
}


def detect_world(environment: Mapping[str, str] = os.environ) -> World:
    """Rank, local rank, world, master address and port from a launcher's variables.

    Read are RANK, LOCAL_RANK, WORLD_SIZE (deepspeed launcher, torchrun), OMPI_COMM_WORLD_* (Open MPI) and SLURM_* of a
    process that srun started (a batch script itself is no rank). None of them means a single process. A launcher that
    srun or mpirun started once per node is not a contradiction: it counts, and what started it does not.

    Raises:
        UserError: a source is incomplete or makes no sense, two disagree, or nothing tells where rank 0 is.
    """
    claims = [claim for claim in (_launcher(environment), _open_mpi(environment), _slurm(environment)) if claim]
    if not claims:
        return World()
    first = claims[0]
    for other in claims[1:]:
        _refuse_contradiction(environment, first, other)
    port = environment.get("MASTER_PORT")
    if port is not None and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise UserError(f"MASTER_PORT = {shown(port)}: needs a port, 1 to 65535")
    address = environment.get("MASTER_ADDR") or _master_address(environment, first)
    job = _job(environment, first)
    told_by = " ".join(_UNSET[claim.source] for claim in claims)
    return World(
        first.rank, first.local_rank, first.size, first.local_size, address, int(port) if port else None, job, told_by
    )


def _launcher(environment: Mapping[str, str]) -> _Claim | None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    present = [name for name in names if name in environment]
    if not present:
        return None
    if len(present) < len(names):
        missing = ", ".join(sorted(set(names) - set(present)))
        raise UserError(
            f"{', '.join(present)} set but {missing} not; start with the deepspeed launcher or torchrun, or, to run "
            f"alone: unset {' '.join(present)}"
        )
    rank, local_rank, size = (_number(environment, name) for name in names)
    # torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE.
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environment), None)
    if local is None and environment.get("MASTER_ADDR", LOCALHOST) not in (LOCALHOST, "localhost"):
        raise UserError("LOCAL_WORLD_SIZE is not set; give the number of processes on this node")
    return _sensible(_Claim("RANK", rank, local_rank, size, _number(environment, local) if local else size))


def _open_mpi(environment: Mapping[str, str]) -> _Claim | None:
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    names = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")]
    rank, local_rank, size, local_size = (_number(environment, name) for name in names)
    nodes = -(-size // max(local_size, 1))
    return _sensible(_Claim("OMPI_COMM_WORLD_RANK", rank, local_rank, size, local_size, nodes))


def _slurm(environment: Mapping[str, str]) -> _Claim | None:
    """Only what srun started: in a batch script SLURM_PROCID is 0 too, but there is no step."""
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return None
    size = _number(environment, "SLURM_STEP_NUM_TASKS")
    per_node = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
    node = _number(environment, "SLURM_NODEID") if "SLURM_NODEID" in environment else 0
    if node >= len(per_node):
        raise UserError(
            f"SLURM_NODEID = {node} does not fit SLURM_STEP_TASKS_PER_NODE, which has {len(per_node)} nodes"
        )
    rank, local_rank = (_number(environment, name) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    return _sensible(_Claim("SLURM_PROCID", rank, local_rank, size, per_node[node], len(per_node)))


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise UserError(f"{name} = {shown(value)}: needs a number; the launcher sets it")
    return int(value)


def _sensible(claim: _Claim) -> _Claim:
    if claim.rank >= claim.size:
        raise UserError(f"{claim.source} = {claim.rank} does not fit WORLD_SIZE = {claim.size}")
    if claim.local_rank >= claim.local_size:
        raise UserError(f"local rank {claim.local_rank} does not fit {claim.local_size} processes on this node")
    return claim


def _refuse_contradiction(environment: Mapping[str, str], ours: _Claim, outer: _Claim) -> None:
    """`outer` is a source that may have started the launcher that `ours` comes from."""
    if (ours.rank, ours.size) == (outer.rank, outer.size):
        return
    # Variables that only torchrun, the deepspeed launcher and mpirun set for the processes they start.
    marks = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE", "OMPI_COMM_WORLD_RANK")
    once_a_node = outer.size == outer.nodes and ours.size >= outer.size
    if once_a_node and any(mark in environment for mark in marks):
        return
    raise UserError(
        f"{ours.source} says rank {ours.rank} of {ours.size}, {outer.source} says rank {outer.rank} of {outer.size}; "
        f"unset the variables that are left over from elsewhere, or start one launcher per node"
    )


def _master_address(environment: Mapping[str, str], claim: _Claim) -> str:
    if claim.size == claim.local_size:
        return LOCALHOST
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_host(nodes)
    raise UserError(
        f"{claim.size} ranks on several nodes, but MASTER_ADDR is not set; give the host of rank 0, with mpirun: "
        "-x MASTER_ADDR=HOST -x MASTER_PORT=29500"
    )


def _job(environment: Mapping[str, str], claim: _Claim) -> str:
    if claim.source == "SLURM_PROCID":
        return f"{environment.get(JOB_VARIABLE, '0')}.{environment['SLURM_STEP_ID']}"
    names = ("TORCHELASTIC_RUN_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", JOB_VARIABLE)
    return next((environment[name] for name in names if name in environment), f"uid{os.getuid()}")


def first_host(nodelist: str) -> str:
    """The first host of SLURM's short form: 'gpu[003-007,9],x1' is 'gpu003'."""
    match = re.match(r"((?:[^,\[\]]|\[[^\]]*\])+)", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[1]) if match else nodelist


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form of task counts: '2(x3),1' is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part.strip())
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE = {shown(text)}: not in SLURM's form, for example 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def planned_world(text: str) -> World:
    """Rank 0 of as many processes as `text` says: `8` on one node, `4x8` on four.

    Raises:
        UserError: it says neither.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", text)
    if match is None:
        raise UserError(f"--processes {text!r}: expected a number, or NODESxPROCESSES as in 4x8")
    local = int(match[2])
    return World(size=int(match[1] or 1) * local, local_size=local)
