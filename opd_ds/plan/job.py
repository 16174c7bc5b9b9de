"""What a batch job should ask for, from a plan of its run."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from opd_ds.cluster.rendezvous import prepare_environment
from opd_ds.cluster.world import World
from opd_ds.config.schema import RunConfig
from opd_ds.plan.costs import Costs
from opd_ds.plan.devices import GIB, parse_devices
from opd_ds.plan.network import find_model
from opd_ds.plan.planner import make_plan
from opd_ds.utils.logging import quiet_libraries

MARGIN = 1.25  # of host memory, over what is planned: files that are read and pages that are shared count too
STATE_BYTES = 20  # a trained element in a checkpoint: master, two moments, an average, an earlier policy
WRITTEN = 1e9  # bytes a second; assumed


@dataclass(frozen=True)
class Needs:
    """Attributes:
    memory: GiB of a node's host memory.
    saving: seconds for two rounds and a checkpoint.
    """

    memory: int
    saving: float


def job_needs(config: RunConfig, gpu: str, nodes: int, per_node: int) -> Needs:
    """With `per_node` GPUs of the kind `gpu` on each node. Takes a minute or more.

    Raises:
        UserError: as `opd-ds plan` does.
    """
    devices = parse_devices(f"{nodes * per_node}x{gpu}", "--gpu")
    prepare_environment(World())  # DeepSpeed looks for it when it is imported
    quiet_libraries()
    costs = Costs(find_model(config), config)
    plan = make_plan(config, costs, devices)
    written = STATE_BYTES * costs.student().trained / WRITTEN
    memory = ceil(MARGIN * plan.memory.host_peak(per_node) / GIB)
    return Needs(memory, 2 * plan.seconds.total + written)
