"""`python -m benchmarks fake-world`: what one of hundreds of ranks holds and receives, against the formulas.

One process plays rank 0 in torch's fake process group. Tensors have the sizes that they would have and no sense, so
bytes and counts are true, and losses and seconds are not.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from opd_ds.cluster.world import World
from opd_ds.config.loading import parse_config
from opd_ds.config.paths import resolve_ds_config
from opd_ds.config.sections import EmaSection
from opd_ds.engine import NetworkSizes, ShardedEma, StudentEngine, fake_group, fill_sizes, read_ds_config
from opd_ds.engine import student_ds_config as complete
from opd_ds.errors import UserError
from opd_ds.miniature.networks import Sizes, make_pipeline
from opd_ds.plan.inputs import network_inputs
from opd_ds.plan.network import Counts, count
from opd_ds.plan.zero import Phase, Zero, student_state

DS_CONFIGS = ("zero2", "zero3", "zero3_hpz")
MICRO_BATCHES, STEPS, PER_NODE = 3, 4, 8
_SMALL = 1000  # elements; at the shipped threshold most of this network would stay whole on every rank
_KINDS = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}
_ELEMENT, _MIB = 4, 2**20


class Collectives(TorchDispatchMode):
    """Counts what torch sends meanwhile: `received[kind, ranks]` in bytes and `messages[kind, ranks]`. A rank of n
    receives (n - 1) / n of what is gathered or scattered, and twice that of an all-reduce.
    """

    def __init__(self, world: int) -> None:
        super().__init__()
        self._world = world
        self.received: Counter[tuple[str, int]] = Counter()
        self.messages: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _KINDS.get(func.overloadpacket.__name__) if func.namespace == "c10d" else None
        if kind == "all-reduce":
            self._add(kind, self._world, 2 * sum(t.nbytes for t in args[0]) * (self._world - 1) / self._world)
        elif kind is not None:
            small, large = sorted((args[0], args[1]), key=lambda tensor: tensor.nbytes)
            self._add(kind, large.numel() // small.numel(), large.nbytes - small.nbytes)
        return func(*args, **(kwargs or {}))

    def _add(self, kind: str, ranks: int, nbytes: float) -> None:
        self.received[kind, ranks] += round(nbytes)
        self.messages[kind, ranks] += 1


def bench(ranks: int, folder: Path, say: Callable[[str], None]) -> None:
    """A process for each of `DS_CONFIGS`; writes fake_world.json and fake_world.md.

    Raises:
        UserError: ranks that are no full nodes; a process failed.
    """
    if ranks < 2 or (ranks > PER_NODE and ranks % PER_NODE):
        raise UserError(f"--ranks {ranks}: allowed are 2 to {PER_NODE} or multiples of {PER_NODE}")
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name in DS_CONFIGS:
        command = [sys.executable, "-m", "benchmarks.fake_world", name, str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(
                f"{name} on {ranks} fake ranks ended with exit code {done.returncode}: {done.stderr[-800:]}"
            )
        found.append(json.loads(done.stdout.splitlines()[-1]))
        say(f"{name}: done")
    (folder / "fake_world.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "fake_world.md").write_text(as_markdown(found), encoding="utf-8")
    say(f"table: {folder / 'fake_world.md'}")


def as_markdown(found: list[dict[str, Any]]) -> str:
    """State first, then what is received in a round."""
    lines = [
        "| ds_config | ranks | what | messages | counted, MiB | by the formula, MiB |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for row in found:
        head = f"| {row['ds_config']} | {row['ranks']} |"
        lines.append(f"{head} state of a rank | | {row['state'] / _MIB:.2f} | {row['planned_state'] / _MIB:.2f} |")
        for what, one in row["collectives"].items():
            expected = "" if one["formula"] is None else f"{one['formula'] / _MIB:.2f}"
            lines.append(f"{head} {what} | {one['messages']} | {one['received'] / _MIB:.2f} | {expected} |")
    return "\n".join(lines) + "\n"


def measure(name: str, ranks: int) -> dict[str, Any]:
    """Rank 0's state and the collectives of its third round, under the shipped ds_config `name`."""
    world = World(size=ranks, local_size=min(ranks, PER_NODE))
    group = fake_group(world)
    network = make_pipeline(["a"], Sizes(), seed=0).transformer
    ds_config = _ds_config(name, world, network)
    zero, counts = Zero.of(ds_config, ranks), count(network, _SMALL)
    config = network.config
    inputs = network_inputs("SD3Transformer2DModel", config, (config["in_channels"], 8, 8), 1, 20, torch.float32)
    inputs = {key: torch.randn(x.shape) if isinstance(x, Tensor) else x for key, x in inputs.items()}
    before = _alive(network)
    student = StudentEngine(network.train(), ds_config, group, "once")
    average = ShardedEma(student, EmaSection(decay=0.9))

    def a_round() -> None:
        with torch.no_grad(), student.gathered() as whole:
            for _ in range(STEPS):
                whole(**inputs)
        for index in range(MICRO_BATCHES):
            student.accumulate(student(**inputs)[0].square().mean(), last=index == MICRO_BATCHES - 1)
        student.step()
        average.update()

    a_round()
    a_round()  # from now on DeepSpeed knows the order of modules
    state = _alive() - before
    with Collectives(ranks) as seen:
        a_round()
    planned = student_state(counts, "fp32", _ELEMENT, zero, copies=1, on_cpu=False)
    formulas = received(counts, zero)
    return {
        "ds_config": name,
        "ranks": ranks,
        "state": state,
        "planned_state": sum(part.nbytes for part in planned.device if part.alive(Phase.ENCODE)),
        "collectives": {
            f"{kind} among {among}": {
                "messages": seen.messages[kind, among],
                "received": nbytes,
                "formula": formulas.get((kind, among)),
            }
            for (kind, among), nbytes in sorted(seen.received.items())
        },
    }


def received(counts: Counts, zero: Zero) -> dict[tuple[str, int], float]:
    """Bytes that a rank receives in a round, by collective and the number of ranks in it (docs/speed.md)."""
    world, trained = zero.world, _ELEMENT * counts.trained
    others = (world - 1) / world
    if zero.stage == 2:  # every micro-batch reduces to all; new weights come once
        return {
            ("all-reduce", world): 2 * trained * others * MICRO_BATCHES,
            ("all-gather", world): trained * others,
        }
    whole = _ELEMENT * (counts.parameters - counts.small)
    again = whole - min(whole, _ELEMENT * zero.reuse / 2)  # what does not stay between forward and backward
    small = _ELEMENT * counts.small * others  # after the step
    found = {("reduce-scatter", world): trained * others * MICRO_BATCHES}
    if zero.gather > 1:  # the first gather after a step leaves a second shard in the node
        within = (zero.gather - 1) / zero.gather
        found["all-gather", world] = whole * others + small
        found["all-gather", zero.gather] = (whole + again) * within * MICRO_BATCHES
    else:
        found["all-gather", world] = (whole + (whole + again) * MICRO_BATCHES) * others + small
    return found


def _ds_config(name: str, world: World, network: nn.Module) -> dict[str, Any]:
    """The shipped one, completed as for a run, with a threshold for this small network."""
    config = parse_config(
        {
            "run": {"rounds": 1, "output_dir": "none"},
            "model": {"path": "none"},
            "precision": "fp32",
            "rollout": {"samples": 1, "steps": STEPS, "guidance": 1.0, "micro_batch": 1},
            "train": {"micro_batch": 1},
            "tasks": {"one": {"teacher": {"path": "none"}, "prompts": "none"}},
        }
    )
    template = read_ds_config(resolve_ds_config(name, "deepspeed"))
    template["zero_optimization"]["stage3_param_persistence_threshold"] = _SMALL
    return fill_sizes(complete(template, config, world, name), NetworkSizes.of(network))


def _alive(network: nn.Module | None = None) -> int:
    """Bytes of all storages that live, but for those of `network`."""
    tensors = (*network.parameters(), *network.buffers()) if network is not None else ()
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at an object asks deprecated modules what they are
        found = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    held = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found if one.device.type == "cpu"
    }
    return sum(nbytes for address, nbytes in held.items() if address not in known)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
