"""GPU kinds, and what `8xH100-80GB` means."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from opd_ds.cluster.world import World
from opd_ds.errors import UserError, nearest
from opd_ds.utils.machine import host_memory

GIB = 2**30
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class DeviceKind:
    """Peak numbers from the makers' data sheets, dense bf16.

    Attributes:
        memory: bytes that a process can allocate.
        flops: bf16 peak a second, without sparsity.
        link: bytes a second and direction to the other GPUs of a node.
        host: bytes a second between device and host memory.
        host_memory: bytes of its node's host memory for each device, as machines with this kind usually have; assumed.
        price: US dollars an hour, a round number for renting one; assumed. 0: none is assumed.
    """

    name: str
    memory: float
    flops: float
    link: float
    host: float
    host_memory: float
    price: float = 0.0

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


# What nvidia-smi calls total is a little less than the name says.
_KINDS = {
    kind.name: kind
    for kind in (
        DeviceKind("A100-40GB", 39.4 * GIB, 312e12, 300e9, 25e9, 128 * GIB, 1.50),
        DeviceKind("A100-80GB", 79.2 * GIB, 312e12, 300e9, 25e9, 128 * GIB, 2.00),
        DeviceKind("H100-80GB", 79.1 * GIB, 989e12, 450e9, 50e9, 224 * GIB, 3.00),
        DeviceKind("H200-141GB", 139.8 * GIB, 989e12, 450e9, 50e9, 224 * GIB, 3.50),
        DeviceKind("B200-180GB", 178.0 * GIB, 2250e12, 900e9, 50e9, 224 * GIB, 5.00),
        DeviceKind("A6000-48GB", 47.5 * GIB, 155e12, 25e9, 25e9, 64 * GIB, 0.80),
        DeviceKind("L40S-48GB", 44.7 * GIB, 362e12, 25e9, 25e9, 96 * GIB, 1.00),
        DeviceKind("RTX4090-24GB", 23.5 * GIB, 165e12, 25e9, 25e9, 64 * GIB, 0.50),
        DeviceKind("cpu", 64.0 * GIB, 0.1e12, 10e9, 10e9, 64 * GIB),
    )
}


@dataclass(frozen=True)
class Devices:
    """So many devices of one kind, at most eight on a node.

    Attributes:
        host: bytes of a node's host memory; None: what the kind usually has.
    """

    kind: DeviceKind
    count: int
    host: float | None = None

    @property
    def per_node(self) -> int:
        return min(self.count, GPUS_PER_NODE)

    @property
    def host_memory(self) -> float:
        """Bytes of a node's host memory."""
        return self.per_node * self.kind.host_memory if self.host is None else self.host

    @property
    def world(self) -> World:
        return World(size=self.count, local_size=self.per_node)

    @classmethod
    def like(cls, name: str, count: int, memory: float) -> Devices:
        """GPUs that a driver calls `name` (`NVIDIA H100 80GB HBM3`), with `memory` bytes each; of an unknown kind they
        are taken for H100s, which matters to times only.
        """
        plain = name.replace(" ", "").upper()
        known = [kind for kind in _KINDS.values() if kind.name.partition("-")[0] in plain]
        kind = known[0] if known else _KINDS["H100-80GB"]
        return cls(replace(kind, memory=memory), count)

    def __str__(self) -> str:
        return f"{self.count}x{self.kind.name}"


def parse_host_memory(text: str | None, option: str) -> float | None:
    """Bytes, from GiB or `here`; None where nothing is said.

    Raises:
        UserError: no positive number.
    """
    if text is None:
        return None
    if text == "here":
        return host_memory()
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < float("inf"):
        raise UserError(f"{option} = {text!r}: allowed are GiB of a node, as 1024, or `here` for this machine's memory")
    return gib * GIB


def parse_devices(text: str, option: str, host: float | None = None) -> Devices:
    """`8xH100-80GB`, `H100-80GB` for one, `2xcpu`; `host` as in `Devices`.

    Raises:
        UserError: an unknown kind, no positive count, or nodes that are not full.
    """
    count, kind = re.fullmatch(r"(?:(\d+)x)?(.+)", text).groups()  # type: ignore[union-attr]  # matches anything
    names = {name.lower(): name for name in _KINDS}
    if kind.lower() not in names:
        raise UserError(
            f"{option} = {text!r}: unknown kind {kind!r}; allowed, with a count in front as in 8xH100-80GB: "
            f"{', '.join(_KINDS)}.{nearest(kind, _KINDS)}"
        )
    number = int(count or 1)
    if number < 1 or (number > GPUS_PER_NODE and number % GPUS_PER_NODE):
        raise UserError(f"{option} = {text!r}: allowed are 1 to {GPUS_PER_NODE} devices or multiples of them")
    return Devices(_KINDS[names[kind.lower()]], number, host)
