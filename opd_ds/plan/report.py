"""A plan for people and for machines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import yaml

from opd_ds.config.schema import RunConfig
from opd_ds.errors import UserError
from opd_ds.plan import timing
from opd_ds.plan.devices import GIB
from opd_ds.plan.memory import allowance, batches
from opd_ds.plan.network import Model
from opd_ds.plan.passes import Passes, round_passes
from opd_ds.plan.pipeline import overlapped
from opd_ds.plan.planner import Comparison, Plan
from opd_ds.plan.zero import Part, Phase


def as_json(found: Comparison, detailed: Plan | None, price: float | None = None) -> dict[str, Any]:
    """Bytes, seconds and counts of the plan `detailed`, and both plans in short.

    Args:
        price: money for one device and hour; default: what is assumed for the kind.
    """
    costs, plan = found.costs, detailed
    if plan is None:
        raise UserError(found.problem)
    model, counts, memory, devices = costs.model, costs.student(), plan.memory, plan.devices
    phase = memory.worst
    recommended = found.setting is not None and plan is found.recommended
    return {
        "model": {
            "source": model.source,
            "transformer": model.transformer_class,
            "parameters": costs.base().parameters,
            "buffers": counts.buffers,
            "trained": counts.trained,
            "latent_shape": list(model.family.latent_shape),
            "text_tokens": model.tokens,
            "distilled": _distilled(model, plan.config),
        },
        "devices": {"kind": devices.kind.name, "count": devices.count, "memory": devices.kind.memory},
        "plan_of": "recommended" if recommended else "configured",
        "device_bytes": {
            "phase": phase.value,
            "parts": _by_name(part for part in memory.device if part.alive(phase)),
            "phases": {one.value: memory.in_phase(one) for one in Phase},
            "peak": memory.peak,
            "allowance": allowance(memory, devices),
            "needed": plan.needed,
            "fits": plan.needed <= devices.kind.memory,
        },
        "host_bytes_per_node": {
            "per_process": _by_name(memory.host),
            "once": _by_name(memory.node),
            "processes": devices.per_node,
            "peak": plan.host_needed,
            "memory": devices.host_memory,
            "assumed": devices.host is None,
            "fits": plan.host_needed <= devices.host_memory,
        },
        "round": {
            "passes": _passes(plan),
            "pass_units": _pass_units(plan),
            "batches": batches(plan.config, devices),
            "seconds": plan.seconds.phases | {"total": plan.seconds.total},
            "run_hours": _hours(plan),
        },
        "cost": cost(plan, price),
        "compared": {"configured": _in_short(found.configured), "recommended": _in_short(found.recommended)},
        "split": _split(found),
        "fit": None if found.setting is None else found.setting.overrides(plan.config),
        "problem": found.problem,
        "notes": memory.notes,
        "assumptions": assumptions(),
    }


def _distilled(model: Model, config: RunConfig) -> str | None:
    if model.distilled is None:
        return None
    guidances = {config.student_guidance(task) for task in config.tasks}
    guidances |= {teacher.guidance for teacher in config.all_teachers.values()}
    given = ", ".join(f"{value:g}" for value in sorted(guidances))
    return (
        f"distilled, made to be drawn in {model.distilled} steps with guidance 1; this run: {config.rollout.steps} "
        f"steps, {config.evaluation.steps} in evaluation, guidance {given}"
    )


def _split(found: Comparison) -> dict[str, Any] | None:
    """Teachers on ranks of their own, simulated from the phases' seconds; None where that is not faster."""
    plain, split = found.recommended or found.configured, found.split
    if plain is None or split is None:
        return None
    return {
        "ranks": split.config.scoring.ranks,
        "phases": split.seconds.phases,
        "seconds": split.seconds.total,
        "seconds_late": overlapped(split.seconds.phases, 1, 1, late=True),
        "seconds_without": plain.seconds.total,
        "device_bytes": split.needed,
    }


def _hours(plan: Plan) -> float:
    return plan.seconds.total * plan.config.run.rounds / 3600


def cost(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """Device hours of a run's rounds and their price, None where none is known.

    Args:
        price: as for `as_json`.
    """
    hours, hourly = _hours(plan) * plan.devices.count, plan.devices.kind.price if price is None else price
    known = price is not None or hourly > 0
    return {
        "device_hours": hours,
        "price_per_hour": hourly if known else None,
        "money": hours * hourly if known else None,
        "assumed": price is None,
    }


def _in_short(plan: Plan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    config = plan.config
    return {
        "fits": plan.fits,
        "device_bytes": plan.needed,
        "host_bytes": plan.host_needed,
        "worst_phase": plan.memory.worst.value,
        "round_seconds": plan.seconds.total,
        "run_hours": _hours(plan),
        "deepspeed": config.deepspeed,
        "rollout_mode": config.rollout.mode,
        "checkpointing": config.student.gradient_checkpointing,
        "placement": ", ".join(sorted({teacher.placement for teacher in config.teachers.values()})) or None,
        "rollout_micro_batch": config.rollout.micro_batch,
        "train_micro_batch": config.train.micro_batch,
        "evaluation_micro_batch": config.evaluation.micro_batch,
        "decode_micro_batch": config.model.decode_micro_batch,
    }


def as_text(found: dict[str, Any]) -> str:
    """What `as_json` says, as a page."""
    model, device, host, a_round = (found[key] for key in ("model", "device_bytes", "host_bytes_per_node", "round"))
    kind = f"{found['devices']['count']}x{found['devices']['kind']}"
    shape = "x".join(map(str, model["latent_shape"]))
    of = "the run with the recommended setting" if found["plan_of"] == "recommended" else "the run as configured"
    assumed = " (assumed; --host-memory)" if host["assumed"] else ""
    lines = [
        "# model",
        f"{model['transformer']}, {model['parameters'] / 1e9:.3f} B parameters and {model['buffers'] / 1e9:.3f} B in "
        f"buffers ({model['source']}); {model['trained'] / 1e6:,.1f} M trained",
        f"latents {shape}, {model['text_tokens']} text tokens; below: {of}",
        *([f"{model['distilled']} (docs/families.md)"] if model["distilled"] else []),
        "",
        f"# memory of one device ({kind}) in its worst phase, {device['phase']}: GiB",
        *_table(device["parts"]),
        *_table({"tensors": device["peak"], "allowance": device["allowance"]}),
        _row("needed", device["needed"]) + _verdict(found["devices"]["memory"], device["fits"]),
        "by phase: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in device["phases"].items()),
        "",
        f"# memory of one node's host: GiB, of each of {host['processes']} processes",
        *_table(host["per_process"]),
        *(["once for all of them:", *_table(host["once"])] if host["once"] else []),
        _row("at once, of all", host["peak"]) + _verdict(host["memory"], host["fits"]) + assumed,
        "",
        "# a round",
        *(
            f"{name:28} {p['forward']:9,} forward {p['backward']:9,} backward"
            + (f" ({p['negative']:,} with the negative prompt)" if p["negative"] else "")
            for name, p in a_round["passes"].items()
        ),
        f"pass units (forward + 2 x backward): {a_round['pass_units']['per_trajectory']:.1f} a trajectory, "
        f"{a_round['pass_units']['per_trained_state']:.1f} a trained state",
        "rows in a forward: " + ", ".join(f"{name} {size}" for name, size in a_round["batches"].items()),
        "seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in a_round["seconds"].items()),
        f"the run: {a_round['run_hours']:.1f} hours{_priced(found['cost'])}, without evaluations and checkpoints",
    ]
    if found["notes"]:
        lines += ["", "# taken for granted", *found["notes"]]
    lines += ["", "# assumptions", *found["assumptions"]]
    lines += ["", f"# as configured, and recommended: the fastest setting that fits on {kind}"]
    lines += [*_side_by_side(**found["compared"]), *([found["problem"]] if found["problem"] else [])]
    if found["fit"]:
        lines += ["", " \\\n".join(f"  --set {line}" for line in found["fit"])]
    return "\n".join([*lines, *_split_lines(found["split"], found["devices"]["count"])])


def _split_lines(split: dict[str, Any] | None, ranks: int) -> list[str]:
    if split is None:
        return []
    without = split["seconds_without"]
    return [
        "",
        f"# teachers on ranks of their own (docs/speed.md), as the plan simulates a round: {split['ranks']} of {ranks}",
        f"  --set scoring.ranks={split['ranks']}, and resident teachers: {split['seconds']:.2f} s a round instead of "
        f"{without:.2f}, {without / split['seconds']:.2f}x; with scoring.late=1 {split['seconds_late']:.2f} s, "
        f"{without / split['seconds_late']:.2f}x; {split['device_bytes'] / GIB:.1f} GiB a device",
    ]


def _priced(found: dict[str, Any]) -> str:
    hours = f", {found['device_hours']:,.0f} device hours"
    if found["money"] is None:
        return hours
    hourly = f"{found['price_per_hour']:.2f}" + (" US dollars, assumed (--gpu-price)" if found["assumed"] else "")
    return f"{hours}, {found['money']:,.0f} at {hourly}"


def as_config(config: RunConfig, devices: str) -> str:
    """`config` as a YAML file, with what was set in it; the rest is defaults."""
    settings = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    return f"# The fastest setting that fits on {devices}, by `opd-ds plan`.\n{settings}"


def _verdict(there: float, fits: bool) -> str:
    return f"  of {there / GIB:,.1f}: {'fits' if fits else 'DOES NOT FIT'}"


def _side_by_side(configured: dict[str, Any] | None, recommended: dict[str, Any] | None) -> list[str]:
    """One line a value, of both plans; `-` where there is none."""

    def shown(key: str, value: Any) -> str:
        if key.endswith("_bytes"):
            return f"{value / GIB:,.1f} GiB"
        if isinstance(value, bool | None):
            return {True: "yes", False: "no", None: "-"}[value]
        return f"{value:,.2f}" if isinstance(value, float) else str(value)

    keys = list(configured or recommended or ())
    columns = [[shown(key, plan[key]) if plan else "-" for key in keys] for plan in (configured, recommended)]
    rows = zip((key.replace("_", " ") for key in keys), *columns, strict=True)
    return [f"{name:26} {first:>22} {second:>22}".rstrip() for name, first, second in rows]


def assumptions() -> list[str]:
    """Which numbers are not measured."""
    return [
        f"time: {timing.ACHIEVED:.0%} of the bf16 peak, {timing.LINK_ACHIEVED:.0%} of the links, "
        f"{timing.BETWEEN_NODES / 1e9:.0f} GB/s a device between nodes, {timing.OPERATION * 1e6:.0f} us to start a "
        "kernel; moving weights hides behind arithmetic",
        "host memory of a node: what nodes of the kind usually have, unless --host-memory says it",
        "allowance on a GPU: CUDA context 0.6 GiB, NCCL 1.0 GiB, 5 % of tensors for what the allocator cannot use",
    ]


def _passes(plan: Plan) -> dict[str, dict[str, int]]:
    """Of a round of all tasks over all devices, by phase."""
    total: dict[str, Passes] = defaultdict(Passes)
    for task in plan.config.tasks:
        for phase, passes in round_passes(plan.config, task).items():
            total[phase] += passes
    return {
        phase: {"forward": one.forward, "backward": one.backward, "negative": one.negative}
        for phase, one in total.items()
    }


def _pass_units(plan: Plan) -> dict[str, float]:
    """Of a round of all tasks, by trajectory and by trained state."""
    tasks = plan.config.tasks
    units = sum((one for task in tasks for one in round_passes(plan.config, task).values()), Passes()).units
    trajectories = sum(map(plan.config.samples, tasks))
    return {
        "per_trajectory": units / trajectories,
        "per_trained_state": units / (trajectories * plan.config.trained_steps),
    }


def _by_name(parts: Iterable[Part]) -> dict[str, float]:
    sizes: dict[str, float] = defaultdict(float)
    for part in parts:
        sizes[part.name] += part.nbytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _table(sizes: dict[str, float]) -> list[str]:
    return [_row(name, size) for name, size in sizes.items()]


def _row(name: str, size: float) -> str:
    return f"{name:36} {size / GIB:8.2f}"
