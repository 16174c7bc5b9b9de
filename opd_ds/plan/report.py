"""A plan for people and for machines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from opd_ds.plan import timing
from opd_ds.plan.costs import Costs
from opd_ds.plan.devices import GIB
from opd_ds.plan.memory import allowance, batches
from opd_ds.plan.passes import Passes, round_passes
from opd_ds.plan.planner import Plan, Setting
from opd_ds.plan.zero import Part, Phase


def as_json(plan: Plan, costs: Costs, setting: Setting | None) -> dict[str, Any]:
    """Bytes, seconds and counts; `setting` is the search's, None when nothing fits."""
    model, counts, memory = costs.model, costs.student(), plan.memory
    phase = memory.worst
    return {
        "model": {
            "source": model.source,
            "transformer": model.transformer_class,
            "parameters": costs.base().parameters,
            "buffers": counts.buffers,
            "trained": counts.trained,
            "latent_shape": list(model.family.latent_shape),
            "text_tokens": model.tokens,
        },
        "devices": {"kind": plan.devices.kind.name, "count": plan.devices.count, "memory": plan.devices.kind.memory},
        "device_bytes": {
            "phase": phase.value,
            "parts": _by_name(part for part in memory.device if part.alive(phase)),
            "phases": {one.value: memory.in_phase(one) for one in Phase},
            "peak": memory.peak,
            "allowance": allowance(memory, plan.devices),
            "needed": plan.needed,
            "fits": plan.fits,
        },
        "host_bytes_per_node": {
            "per_process": _by_name(memory.host),
            "once": _by_name(memory.node),
            "processes": plan.devices.per_node,
            "peak": memory.host_peak(plan.devices.per_node),
        },
        "round": {
            "passes": _passes(plan),
            "batches": batches(plan.config, plan.devices),
            "seconds": plan.seconds.phases | {"total": plan.seconds.total},
            "run_hours": plan.seconds.total * plan.config.run.rounds / 3600,
        },
        "fit": None if setting is None else setting.overrides(plan.config),
        "notes": memory.notes,
        "assumptions": assumptions(),
    }


def as_text(found: dict[str, Any]) -> str:
    """What `as_json` says, as a page."""
    model, device, host, a_round = (found[key] for key in ("model", "device_bytes", "host_bytes_per_node", "round"))
    kind = f"{found['devices']['count']}x{found['devices']['kind']}"
    shape = "x".join(map(str, model["latent_shape"]))
    lines = [
        "# model",
        f"{model['transformer']}, {model['parameters'] / 1e9:.3f} B parameters and {model['buffers'] / 1e9:.3f} B in "
        f"buffers ({model['source']}); {model['trained'] / 1e6:,.1f} M trained",
        f"latents {shape}, {model['text_tokens']} text tokens",
        "",
        f"# memory of one device ({kind}) in its worst phase, {device['phase']}: GiB",
        *_table(device["parts"]),
        *_table({"tensors": device["peak"], "allowance": device["allowance"]}),
        _row("needed", device["needed"])
        + f"  of {found['devices']['memory'] / GIB:.1f}: {'fits' if device['fits'] else 'DOES NOT FIT'}",
        "by phase: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in device["phases"].items()),
        "",
        f"# memory of one node's host: GiB, of each of {host['processes']} processes",
        *_table(host["per_process"]),
        *(["once for all of them:", *_table(host["once"])] if host["once"] else []),
        _row("at once, of all", host["peak"]),
        "",
        "# a round",
        *(f"{name:28} {p['forward']:9,} forward {p['backward']:9,} backward" for name, p in a_round["passes"].items()),
        "rows in a forward: " + ", ".join(f"{name} {size}" for name, size in a_round["batches"].items()),
        "seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in a_round["seconds"].items()),
        f"the run: {a_round['run_hours']:.1f} hours, without evaluations and checkpoints",
    ]
    if found["notes"]:
        lines += ["", "# taken for granted", *found["notes"]]
    lines += ["", "# assumptions", *found["assumptions"]]
    return "\n".join(lines)


def assumptions() -> list[str]:
    """Which numbers are not measured."""
    return [
        f"time: {timing.ACHIEVED:.0%} of the bf16 peak, {timing.LINK_ACHIEVED:.0%} of the links, "
        f"{timing.BETWEEN_NODES / 1e9:.0f} GB/s a device between nodes, {timing.OPERATION * 1e6:.0f} us to start a "
        "kernel; moving weights hides behind arithmetic",
        "allowance on a GPU: CUDA context 0.6 GiB, NCCL 1.0 GiB, 5 % of tensors for what the allocator cannot use",
    ]


def _passes(plan: Plan) -> dict[str, dict[str, int]]:
    """Of a round of all tasks over all devices, by phase."""
    total: dict[str, Passes] = defaultdict(Passes)
    for task in plan.config.tasks:
        for phase, passes in round_passes(plan.config, task).items():
            total[phase] += passes
    return {phase: {"forward": one.forward, "backward": one.backward} for phase, one in total.items()}


def _by_name(parts: Iterable[Part]) -> dict[str, float]:
    sizes: dict[str, float] = defaultdict(float)
    for part in parts:
        sizes[part.name] += part.nbytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _table(sizes: dict[str, float]) -> list[str]:
    return [_row(name, size) for name, size in sizes.items()]


def _row(name: str, size: float) -> str:
    return f"{name:36} {size / GIB:8.2f}"
