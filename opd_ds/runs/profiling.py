"""Profiles of chosen rounds (`run.profile`): a trace of every rank, and a page that says where the round went."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import profile, supported_activities

from opd_ds.config.sections import ProfileSection
from opd_ds.engine import Group
from opd_ds.training.meter import PHASE_RANGE
from opd_ds.training.trainer import RoundReport
from opd_ds.utils.markdown import markdown_table

PROFILE_FOLDER = "profile"
_OPERATORS = 20


def maybe_profiled(
    run_round: Callable[[int], RoundReport], index: int, section: ProfileSection, folder: Path, group: Group
) -> RoundReport:
    """`run_round(index)`; under the profiler where the config asks for it, the files are in `folder`/profile. A round
    under it takes longer. Collective.
    """
    number = index + 1
    if number not in section.rounds:
        return run_round(index)
    with profile(activities=supported_activities()) as profiler:
        report = run_round(index)
    group.progress(f"the profile of round {number}")
    place = folder / PROFILE_FOLDER / f"round-{number:06d}"
    place.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(place / f"rank-{group.world.rank:05d}.trace.json.gz"))
    by_rank = group.gather(report.seconds)
    if group.world.is_main:
        (place / "summary.md").write_text(_summary(number, by_rank, profiler.key_averages()))
    return report


def _summary(number: int, by_rank: list[dict[str, float]], operators: list[FunctionEventAvg]) -> str:
    phases = list(dict.fromkeys(phase for seconds in by_rank for phase in seconds))
    total = sum(by_rank[0].values())
    rows = [
        [phase, f"{by_rank[0].get(phase, 0):.3f}", f"{100 * by_rank[0].get(phase, 0) / total:.0f} %"]
        + [f"{pick(seconds.get(phase, 0) for seconds in by_rank):.3f}" for pick in (min, max)]
        for phase in phases
    ]
    on_device = torch.accelerator.is_available()

    def own(operator: FunctionEventAvg) -> float:
        """Seconds without what it calls."""
        return (operator.self_device_time_total if on_device else operator.self_cpu_time_total) / 1e6

    work = sorted((one for one in operators if not str(one.key).startswith(PHASE_RANGE)), key=own, reverse=True)
    everything = sum(map(own, work)) or 1.0
    top = [
        [one.key, str(one.count), f"{own(one):.3f}", f"{100 * own(one) / everything:.0f} %"]
        for one in work[:_OPERATORS]
    ]
    return "\n".join(
        [
            f"# Where round {number} went",
            "",
            "Seconds of rank 0 by phase, and the least and the most over all ranks. The profiler makes rounds slower.",
            "",
            markdown_table(["phase", "seconds", "share", "least", "most"], rows),
            f"The operators of rank 0 with the most time of their own, on the {'device' if on_device else 'CPU'}:",
            "",
            markdown_table(["operator", "calls", "seconds", "share"], top),
            "The traces beside this page open in https://ui.perfetto.dev or chrome://tracing; ranges that begin with "
            f"`{PHASE_RANGE}` are the phases.",
            "",
        ]
    )
