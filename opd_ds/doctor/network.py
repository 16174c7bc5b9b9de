"""The process group: does it start, is its sum right, how fast is it, and do the nodes' clocks agree."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from opd_ds.cluster.world import World
from opd_ds.doctor.findings import Finding, not_checked, one_line, size_text, who
from opd_ds.errors import UserError

if TYPE_CHECKING:
    from opd_ds.engine import Group

SIZES = (2**20, 2**24, 2**27)
ROUNDS = 5
MOST_SKEW = 1.0
ALL_REDUCE = "all-reduce"
SPEED = "all-reduce speed"
LATENCY = "all-reduce latency"
CLOCKS = "clocks"


@dataclass(frozen=True)
class Measured:
    """One rank's view of the group: `seconds` of an all-reduce by size in bytes, latency in seconds."""

    failure: str | None = None
    backend: str = ""
    total: float = 0.0
    latency: float = 0.0
    seconds: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def within(seconds: float, work: Callable[[], Measured]) -> tuple[Measured, bool]:
    """What `work` gives, or what stopped it; False when it still hangs after `seconds`, in a thread left to itself."""
    results: list[Measured] = []

    def guarded() -> None:
        try:
            results.append(work())
        except UserError as error:
            results.append(Measured(failure=str(error)))
        except Exception as error:  # a peer that is gone, a driver, a network: the report names it
            results.append(Measured(failure=one_line(error)))

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(seconds)
    if results:
        return results[0], True
    return Measured(failure=f"no answer within {seconds:g} s"), False


def measure(world: World) -> Measured:
    """Start the run's process group, sum over it and time it; collective.

    Raises:
        UserError: DeepSpeed cannot start here.
    """
    from opd_ds.engine import init_group

    with init_group(world) as group:
        return _timed(group)


def _timed(group: Group) -> Measured:
    import torch
    import torch.distributed as dist

    total = float(group.sum(torch.tensor(float(group.world.rank + 1))))

    def timed(length: int, rounds: int) -> float:
        values = torch.zeros(length, device=group.device)
        for _ in range(2):  # connections are made at first use
            dist.all_reduce(values)
        _finish(group.device)
        started = time.perf_counter()
        for _ in range(rounds):
            dist.all_reduce(values)
        _finish(group.device)
        return (time.perf_counter() - started) / rounds

    latency = timed(1, 20 * ROUNDS)
    seconds = tuple(timed(size // 4, ROUNDS) for size in SIZES)
    return Measured(None, dist.get_backend(), total, latency, seconds)


def end_group() -> None:
    """Collective; only for a group that works, others would wait in it."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _finish(device: Any) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def group_findings(measured: list[Measured], hosts: list[str]) -> list[Finding]:
    """The slowest rank decides. Bus bandwidth is 2 (n - 1) / n x bytes / seconds, comparable for any n ranks."""
    failures: dict[str, list[int]] = {}
    for rank, own in enumerate(measured):
        if own.failure is not None:
            failures.setdefault(own.failure, []).append(rank)
    if failures:
        said = "\n".join(f"{who(ranks, hosts)}: {failure}" for failure, ranks in failures.items())
        advice = "NCCL_DEBUG=INFO says more; on CPU the first start compiles for a minute: raise --timeout"
        why = "the process group does not work"
        failed = Finding(ALL_REDUCE, "failed", f"{said}\n{advice}")
        return [failed, not_checked(SPEED, why), not_checked(LATENCY, why)]
    count = len(measured)
    expected = count * (count + 1) / 2
    wrong = [rank for rank, own in enumerate(measured) if own.total != expected]
    problem = None
    if wrong:
        totals = ", ".join(f"{measured[rank].total:g}" for rank in wrong)
        problem = f"{who(wrong, hosts)} got {totals}, expected {expected:g}: do not train here; look at NCCL_DEBUG=INFO"
    factor = 2 * (count - 1) / count
    slowest = [max(times) for times in zip(*(own.seconds for own in measured), strict=True)]
    speeds = [
        f"{size_text(size)}: {factor * size / seconds / 1e9:.3g} GB/s ({seconds * 1e3:.3g} ms)"
        for size, seconds in zip(SIZES, slowest, strict=True)
    ]
    latency = max(own.latency for own in measured)
    return [
        Finding(ALL_REDUCE, f"sum {'wrong' if wrong else 'right'} over {count} ranks ({measured[0].backend})", problem),
        Finding(SPEED, "bus bandwidth 2(n-1)/n x bytes / time\n" + "\n".join(speeds)),
        Finding(LATENCY, f"{latency * 1e6:.0f} us (4 bytes)"),
    ]


def no_group(why: str) -> list[Finding]:
    return [not_checked(what, why) for what in (ALL_REDUCE, SPEED, LATENCY)]


def clock_finding(times: list[float], hosts: list[str]) -> Finding:
    """`times`: seconds since the epoch on each rank just after all were let go at once."""
    if len(times) < 2:
        return not_checked(CLOCKS, "one process")
    skew = max(times) - min(times)
    problem = None
    if skew > MOST_SKEW:
        early, late = times.index(min(times)), times.index(max(times))
        problem = (
            f"{who([late], hosts)} is {skew:.1f} s ahead of {who([early], hosts)}: synchronise the nodes (chrony, "
            "ntp); file times and logs cannot be compared"
        )
    return Finding(CLOCKS, f"{skew * 1e3:.1f} ms apart", problem)
