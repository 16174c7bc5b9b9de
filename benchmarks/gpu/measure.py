"""Rounds with the device waited for: seconds and memory by phase, FLOPs, what travels, and what the plan says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.session import Check, Session, synchronise
from benchmarks.plan_worker import peak_memory, reset_peak
from benchmarks.speed.worker import Loop
from opd_ds.config.algorithms import DistilConfig
from opd_ds.plan.costs import Costs
from opd_ds.plan.devices import DeviceKind, Devices, parse_devices
from opd_ds.plan.memory import run_memory
from opd_ds.plan.network import find_model
from opd_ds.plan.passes import Passes, round_passes
from opd_ds.training.meter import RoundMeter
from opd_ds.utils.machine import host_memory

GIB = 2**30


class HostToDevice(TorchDispatchMode):
    """Inside, bytes that operations bring from the host to a device are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "cpu":
            sources = args[1:2] if func is torch.ops.aten.copy_.default else args[:1]
            for source in sources:
                if isinstance(source, torch.Tensor) and source.device.type == "cpu" and source.dim() > 0:
                    self.nbytes += source.nbytes
        return result


@dataclass
class Phases:
    """Of one round, by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)


@contextmanager
def watched(
    trainer: Any, session: Session, inside: dict[str, AbstractContextManager[Any]] | None = None
) -> Iterator[Phases]:
    """Rounds of `trainer`, ours or the public one, meanwhile; a phase ends when the device has done its work.

    Args:
        inside: by phase, a context it runs in.
    """
    # Our rounds have a meter each, the public loop times itself.
    owner, attribute = (trainer, "_phase") if hasattr(trainer, "_phase") else (RoundMeter, "phase")
    plain, phases = getattr(owner, attribute), Phases()

    @contextmanager
    def phase(*arguments: Any) -> Iterator[None]:
        name = arguments[-1]
        synchronise()
        reset_peak(session.group)
        started = time.perf_counter()
        with plain(*arguments), (inside or {}).get(name, nullcontext()):
            yield
            synchronise()
        phases.seconds[name] = phases.seconds.get(name, 0.0) + time.perf_counter() - started
        phases.peaks[name] = max(phases.peaks.get(name, 0), peak_memory(session.group))

    setattr(owner, attribute, phase)
    try:
        yield phases
    finally:
        setattr(owner, attribute, plain)


def time_rounds(loop: Loop, session: Session, *, most: int, seconds: float) -> dict[str, Any]:
    """A round to warm up, then at least one and at most `most`, until `seconds` are over.

    Returns:
        `losses`, `passes` of a round; `first` and median `round` in seconds; `phases` as medians; `peak` in bytes.
    """
    started, all_phases, losses, took = time.perf_counter(), [], [], []
    peak, index = 0, 0
    while index < 2 or (index <= most and time.perf_counter() - started < seconds):
        with watched(loop.inner, session) as phases:
            synchronise()
            began = time.perf_counter()
            loss, _, passes = loop.run(index)
            synchronise()
            took.append(time.perf_counter() - began)
        losses.append(loss)
        peak = max(peak, *phases.peaks.values())
        all_phases.append(phases.seconds)
        index += 1
    middle = {name: median(row[name] for row in all_phases[1:]) for name in all_phases[1]}
    return {
        "losses": losses,
        "passes": passes,
        "first": took[0],
        "round": median(took[1:]),
        "rounds": len(took) - 1,
        "phases": middle,
        "peak": peak,
    }


@dataclass
class Planned:
    """What is known of a config before it runs; FLOPs are measured once per base and kind of student."""

    costs: Costs
    devices: Devices

    @classmethod
    def of(cls, config: DistilConfig, session: Session) -> Planned:
        return cls(Costs(find_model(config), config), this_device(session))

    def peak(self, config: DistilConfig) -> float:
        """Bytes in the most expensive round."""
        return run_memory(config, self.costs, self.devices, rounds_only=True).peak

    def flops(self) -> dict[str, float]:
        """Of one pass over one latent; recomputation is not counted."""
        forward = self.costs.forward(1).flops
        return {"forward": forward, "backward": self.costs.train(1, checkpointing=False).flops - forward}

    def micro_batch(self, config: DistilConfig, sizes: tuple[int, ...], share: float = 0.75) -> int:
        """The first of `sizes` with which the round takes at most `share` of the device."""
        for size in sizes:
            changed = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": size})})
            if self.peak(changed) < share * self.devices.kind.memory:
                return size
        return sizes[-1]


def this_device(session: Session) -> Devices:
    """What the plan is told; rates as the part `versions` has measured them."""
    if not session.on_gpu:
        return parse_devices("1xcpu", "--gpus")
    _, total = torch.cuda.mem_get_info()
    host = session.earlier.get("versions", {}).get("host to device, pinned", {}).get("GB/s", 25.0)
    flops = matmul_flops(session) or 1e14
    kind = DeviceKind(torch.cuda.get_device_name(), float(total), flops, 1e11, host * 1e9, host_memory())
    return Devices(kind, 1)


def matmul_flops(session: Session, precision: str = "bf16") -> float | None:
    """A second, as the part `versions` has measured it."""
    rate = session.earlier.get("versions", {}).get(f"{precision} matrix product", {}).get("TFLOP/s")
    return None if rate is None else rate * 1e12


def describe(found: Check, measured: dict[str, Any], config: DistilConfig, session: Session, planned: Planned) -> None:
    """Put what was measured of one of our loops, or of the public one, into a check."""
    samples = config.rollout.samples * len(config.tasks)
    found |= {"s/round": measured["round"], "samples/s": samples / measured["round"], "rounds": measured["rounds"]}
    found |= {"first round, s": measured["first"], "loss": measured["losses"][0]}
    units = measured["passes"]["forward"] + 2 * measured["passes"]["backward"]
    found["ms/pass unit"] = 1000 * measured["round"] / units
    found |= {f"{name}, s": seconds for name, seconds in measured["phases"].items()}
    peak, flops = matmul_flops(session, config.precision), planned.flops()
    if peak is None:
        return
    work = sum(measured["passes"][kind] * flops[kind] for kind in ("forward", "backward"))
    found["MFU round"] = work / measured["round"] / peak
    if "score" in measured["phases"]:  # the phases are apart: what is rolled out and trained is the student's alone
        phases = _passes(config)
        for name in ("rollout", "train"):
            done = phases[name].forward * flops["forward"] + phases[name].backward * flops["backward"]
            found[f"MFU {name}"] = done / measured["phases"][name] / peak


def _passes(config: DistilConfig) -> dict[str, Passes]:
    total: dict[str, Passes] = {}
    for task in config.tasks:
        for phase, passes in round_passes(config, task).items():
            total[phase] = total.get(phase, Passes()) + passes
    return total
