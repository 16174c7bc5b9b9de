"""The loops of others that ours is timed beside, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.speed.peer import PeerLoop
    from opd_ds.config.algorithms import DistilConfig
    from opd_ds.engine import Group

PUBLIC = "public"


@dataclass(frozen=True)
class Peer:
    """A loop of others.

    Attributes:
        what: whose, for the report.
        batch: trajectories in one of its forwards on a device, in its own configuration for eight GPUs.
        loop: `module:class` of `benchmarks.speed`.
    """

    name: str
    what: str
    batch: int
    loop: str


_ALL = (
    Peer(PUBLIC, "the public DiffusionOPD code", 3, "public_loop:PublicLoop"),
    Peer("flow-opd", "Flow-OPD, mode gkd", 4, "flow_opd_loop:FlowOpdLoop"),
    Peer("flow-factory", "Flow-Factory, trainer diffusion-opd", 3, "flow_factory_loop:FlowFactoryLoop"),
)
PEERS = {peer.name: peer for peer in _ALL}


def peer_loop(name: str) -> Callable[[DistilConfig, Group], PeerLoop]:
    """The class of a peer."""
    module, _, loop = PEERS[name].loop.partition(":")
    found: Callable[[DistilConfig, Group], PeerLoop] = getattr(import_module(f"benchmarks.speed.{module}"), loop)
    return found
