"""Loops timed in turns, in one process per rank.

python -m benchmarks.speed.worker SPEC.json OUT.json        (RANK, WORLD_SIZE and so on as torchrun sets them)

SPEC has `loops`, by name `{"kind": ..., "config": {...}}` where the kind is `ours`, a peer's name or `public with
rewards`, `repetitions`, and `measure`: `time`, `memory` or `state`. Rank 0 writes OUT.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_ds.cluster.rendezvous import prepare_environment
from opd_ds.cluster.world import detect_world

if TYPE_CHECKING:
    from opd_ds.config.algorithms import DistilConfig
    from opd_ds.engine import Group


@dataclass
class Loop:
    """One of the loops, built."""

    name: str
    kind: str
    config: DistilConfig
    inner: Any

    def run(self, index: int) -> tuple[float, dict[str, float], dict[str, int]]:
        """A round: its loss over all ranks, seconds by phase, passes of this rank."""
        if self.kind == "ours":
            report = self.inner.run_round(index)
            passes = {kind: count // self.inner._group.world.size for kind, count in report.passes.items()}
            return report.losses.loss, report.seconds, passes
        loss = self.inner.run_round(index)
        return loss, self.inner.seconds, self.inner.passes


def main(spec_file: str, out: str) -> None:
    """See the module."""
    world = detect_world()
    prepare_environment(world)
    from opd_ds.engine import init_group
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    with init_group(world) as group:
        found = {"time": timed, "memory": memory, "state": state}[spec["measure"]](spec, group)
        if world.is_main:
            Path(out).write_text(json.dumps(found) + "\n", encoding="utf-8")


def build(name: str, wanted: dict[str, Any], group: Group) -> Loop:
    """Load everything that the loop needs."""
    from benchmarks.speed.peers import peer_loop
    from opd_ds.config.algorithms import DistilConfig
    from opd_ds.config.loading import parse_config
    from opd_ds.runs.setup import prepare

    config = parse_config(wanted["config"])
    assert isinstance(config, DistilConfig)
    if wanted["kind"] == "ours":
        inner: Any = prepare(config, group).trainer
    else:
        peer, _, rewarded = wanted["kind"].partition(" with ")
        inner = peer_loop(peer)(config, group)
        if rewarded:
            inner.scoring = _scored_inline(config, inner.family, group)
    return Loop(name, wanted["kind"], config, inner)


def _scored_inline(config: DistilConfig, family: Any, group: Group) -> Any:
    """As the public loop does: images are decoded and scored before the next step."""
    from opd_ds.evaluation.pictures import to_drawn
    from opd_ds.runs.rewards import build_rewards

    rewards = build_rewards(config.rewards, family)

    def score(task: str, latents: Any, prompts: list[str]) -> None:
        images = [to_drawn(one, family.fps) for one in family.decode(latents)]
        for section in config.tasks[task].rewards:
            rewards[section.label].score(images, prompts, [{}] * len(prompts))

    return score


# ---- time ----


def timed(spec: dict[str, Any], group: Group) -> dict[str, Any]:
    """Every loop once to warm up, then rounds of all loops in turns, in another order each time."""
    import torch

    loops = [build(name, wanted, group) for name, wanted in spec["loops"].items()]
    found: dict[str, dict[str, Any]] = {}
    for loop in loops:
        loss, _, passes = loop.run(0)
        losses = group.gather(loss)
        whole = losses[0] if loop.kind == "ours" else sum(losses) / len(losses)
        found[loop.name] = {"first_loss": whole, "passes": passes, "seconds": [], "phases": []}
    for index in range(1, spec["repetitions"] + 1):
        shift = index % len(loops)
        for loop in loops[shift:] + loops[:shift]:
            on_cuda = group.device.type == "cuda"
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
            group.barrier()
            _synchronise(group)
            started = time.perf_counter()
            _, phases, _ = loop.run(index)
            _synchronise(group)
            group.barrier()
            entry = found[loop.name]
            entry["seconds"].append(time.perf_counter() - started)
            entry["phases"].append(phases)
            if on_cuda:
                entry["peak_with_all_loops"] = torch.cuda.max_memory_allocated()
    peak = matmul_peak(group, loops[0].config.precision)
    return {"loops": found, "matmul_flops": peak, "device": _device(group), "threads": torch.get_num_threads()}


def _synchronise(group: Group) -> None:
    import torch

    if group.device.type != "cpu":
        torch.accelerator.synchronize()


def _device(group: Group) -> str:
    import torch

    return torch.cuda.get_device_name() if group.device.type == "cuda" else "cpu"


def matmul_peak(group: Group, precision: str) -> float:
    """FLOPs a second of a rank's best large matrix product in `precision`, while all ranks do the same."""
    import torch

    from opd_ds.training.networks import DTYPES

    size = 8192 if group.device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=group.device, dtype=DTYPES[precision]) for _ in range(2))
    best = float("inf")
    group.barrier()
    for _ in range(10):
        _synchronise(group)
        started = time.perf_counter()
        left @ right
        _synchronise(group)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


# ---- memory ----


def memory(spec: dict[str, Any], group: Group) -> dict[str, Any]:
    """Most bytes of each rank beyond the libraries, for one loop alone in its processes, over two rounds."""
    from benchmarks.plan_worker import baseline_memory, peak_memory, reset_peak, warm_up
    from opd_ds.config.loading import parse_config

    ((name, wanted),) = spec["loops"].items()
    warm_up(parse_config(wanted["config"]), group)
    baseline = baseline_memory(group)
    loop = build(name, wanted, group)
    reset_peak(group)
    for index in range(2):
        loop.run(index)
    return {"peak": group.gather(peak_memory(group) - baseline)}


# ---- state ----


def state(spec: dict[str, Any], group: Group) -> dict[str, Any]:
    """Bytes of the student's state on each rank, and what a round moves between ranks as DeepSpeed counts it."""
    from benchmarks.speed.tensors import alive_bytes
    from opd_ds.engine import counted_collectives

    ((name, wanted),) = spec["loops"].items()
    loop = build(name, wanted, group)
    loop.run(0)
    loop.run(1)  # from now on DeepSpeed knows the order of modules and prefetches
    trainer = loop.inner
    others = [network.module for network in trainer._teachers._networks.values()]
    held = alive_bytes(others, trainer._family)
    with counted_collectives() as moved:
        loop.run(2)
    return {"state": group.gather(held), "collectives": moved}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
    os._exit(0)  # nothing is left to do; DeepSpeed's threads may take their time
