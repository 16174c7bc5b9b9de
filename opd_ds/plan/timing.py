"""Seconds a round takes, from work, bytes moved and what devices can do. The shares of the peak are assumptions."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import ceil

from opd_ds.config.schema import RunConfig
from opd_ds.plan.costs import Costs
from opd_ds.plan.devices import Devices
from opd_ds.plan.memory import Layout, batches, layout, rows_per_rank
from opd_ds.plan.metering import Cost
from opd_ds.plan.network import Counts, bytes_of
from opd_ds.plan.passes import Passes, passes_at_once, round_passes, student_passes
from opd_ds.plan.zero import FP32, Zero

ACHIEVED = 0.40  # of a device's bf16 peak, in products of matrices and attention
PRECISION_FACTOR = {"bf16": 1.0, "fp16": 1.0, "fp32": 1 / 8}
LINK_ACHIEVED = 0.70  # of what links carry
BETWEEN_NODES = 25e9  # bytes a second, device and direction
OPERATION = 6e-6  # seconds to start a kernel: small batches wait for the host
HOST_MEMORY = 150e9  # bytes a second of a node, shared by its processes
_ROUNDING = 1e-9
ADAM_BYTES = 28  # read and written an element by an optimizer step on the host


@dataclass(frozen=True)
class Seconds:
    """Of one round on the slowest rank, by phase.

    Attributes:
        overlapped: all of it, where phases run side by side (`scoring.ranks`).
    """

    phases: dict[str, float]
    overlapped: float | None = None

    @property
    def total(self) -> float:
        return sum(self.phases.values()) if self.overlapped is None else self.overlapped


def round_seconds(config: RunConfig, costs: Costs, devices: Devices, placed_as: Layout | None = None) -> Seconds:
    """A round of all its tasks."""
    placed_as = placed_as or layout(config, costs, devices)
    zero = placed_as.zero
    counts = costs.student(zero.threshold)
    element = bytes_of(config.precision)
    passes = passes_of_a_round(config, devices)
    sizes = batches(config, devices)
    gather = _gather_seconds(counts, element, zero, devices)
    checkpointing = bool(config.student.gradient_checkpointing)

    def asked(phase: str, moved: float) -> float:
        batch = sizes[phase]
        return _seconds(passes[phase].forward, batch, costs.forward(batch), moved, config, devices)

    train = costs.train(sizes["train"], checkpointing=checkpointing)
    # Weights come for forward and backward of each call (recomputation is part of the latter); gradients leave at each
    # micro-batch.
    student = max(student_passes(config, task) for task in config.tasks)
    calls = student // passes_at_once(config, student)
    moved = 2 * calls * gather + _reduce_seconds(counts, element, zero, devices, at_boundary=False)
    trained = passes["train"].backward
    coming = _teacher_gather(config, costs, placed_as, devices, element)
    travel = _teacher_transfer(costs, placed_as, devices, element)
    drawing = config.algorithm.drawn_by == "teacher"
    if drawing:
        rollout = asked("rollout", coming) + travel
    else:
        rollout = asked("rollout", 0.0) + gather if placed_as.gathered else asked("rollout", gather)
    return Seconds(
        {
            "encode": _encode_seconds(config, costs, element, devices),
            "rollout": rollout,
            "score": asked("score", coming) + (0.0 if drawing else travel),
            "train": _seconds(trained, sizes["train"], train, moved, config, devices),
            "step": config.steps_per_round * _step_seconds(counts, element, zero, devices),
        }
    )


def passes_of_a_round(config: RunConfig, devices: Devices) -> dict[str, Passes]:
    """Of one rank and of all the tasks of a round, by phase: a mean where a round has one of them; samples that pad a
    rank's share are counted too.
    """
    forward: dict[str, float] = defaultdict(float)
    backward: dict[str, float] = defaultdict(float)
    for task in config.tasks:
        share = config.share_of_rounds(task) * rows_per_rank(config, devices, task) / config.samples(task)
        for phase, passes in round_passes(config, task).items():
            forward[phase] += share * passes.forward
            backward[phase] += share * passes.backward
    return {phase: Passes(ceil(forward[phase] - _ROUNDING), ceil(backward[phase] - _ROUNDING)) for phase in forward}


def _seconds(passes: int, batch: int, cost: Cost, moved: float, config: RunConfig, devices: Devices) -> float:
    """Of `passes` in batches: each as long as the slowest of arithmetic, starting kernels and moving weights."""
    speed = ACHIEVED * devices.kind.flops * PRECISION_FACTOR[config.precision]
    started = 0.0 if devices.kind.is_cpu else OPERATION * cost.operations
    return ceil(passes / batch) * max(cost.flops / speed, started, moved)


def _link(devices: Devices) -> float:
    """Bytes a second of collectives over all devices."""
    slowest = devices.kind.link if devices.count <= devices.per_node else min(devices.kind.link, BETWEEN_NODES)
    return LINK_ACHIEVED * slowest


def _gather_seconds(counts: Counts, element: int, zero: Zero, devices: Devices) -> float:
    """Of ZeRO-3's weights once: each rank receives what it does not hold, (N - 1) / N of them."""
    if zero.stage < 3:
        return 0.0
    among = zero.gather if zero.gather > 1 else zero.world
    link = LINK_ACHIEVED * devices.kind.link if zero.gather > 1 else _link(devices)
    whole = element * (counts.parameters - counts.small)
    seconds = whole * (among - 1) / among / link
    if zero.offload_param:
        seconds += whole / zero.world / devices.kind.host
    return seconds


def _reduce_seconds(counts: Counts, element: int, zero: Zero, devices: Devices, *, at_boundary: bool) -> float:
    """Of gradients: at stages 0 and 1 once a step, above at each micro-batch; stage 3 only scatters sums."""
    if zero.world == 1 or at_boundary != (zero.stage < 2):
        return 0.0
    moved = element * counts.trained * (zero.world - 1) / zero.world
    return (1 if zero.stage == 3 else 2) * moved / _link(devices)


def _step_seconds(counts: Counts, element: int, zero: Zero, devices: Devices) -> float:
    seconds = _reduce_seconds(counts, element, zero, devices, at_boundary=True)
    if zero.stage in (1, 2) and zero.world > 1:  # new weights go to all ranks
        seconds += element * counts.trained * (zero.world - 1) / zero.world / _link(devices)
    if zero.offload_optimizer:
        shard = counts.trained / zero.world
        seconds += (FP32 + element) * shard / devices.kind.host
        seconds += ADAM_BYTES * shard * devices.per_node / HOST_MEMORY
    return seconds


def _teacher_gather(config: RunConfig, costs: Costs, placed_as: Layout, devices: Devices, element: int) -> float:
    """Of the weights of ZeRO-Inference and streamed teachers, per forward, as a mean over teachers; of the student's
    own where frozen policies are swapped into it.
    """
    if not config.teachers:
        if placed_as.gathered:  # with the rollout
            return 0.0
        return _gather_seconds(costs.base(placed_as.zero.threshold), element, placed_as.zero, devices)
    if not placed_as.teachers:  # on other ranks
        return 0.0
    sharded = [t for t in placed_as.teachers if t.zero and not (t.placement == "shared" and placed_as.gathered)]
    each = [_gather_seconds(costs.base(), element, one.zero, devices) for one in sharded if one.zero]
    if not devices.kind.is_cpu:
        streamed = element * costs.base().parameters / devices.kind.host
        each += [streamed for one in placed_as.teachers if one.placement == "stream"]
    return sum(each) / len(placed_as.teachers)


def _teacher_transfer(costs: Costs, placed_as: Layout, devices: Devices, element: int) -> float:
    """Of offloaded teachers: the weights come once a round, with all LoRAs of one base."""
    if devices.kind.is_cpu:
        return 0.0
    weights = element * costs.base().parameters
    uses = sum(t.placement == "offload" for t in placed_as.teachers)
    return uses * weights / devices.kind.host


def _encode_seconds(config: RunConfig, costs: Costs, element: int, devices: Devices) -> float:
    """Text encoders and VAE over a rank's prompts and pictures, and the encoders' way to the device."""
    model = costs.model
    if config.model.text_encoders == "cached":
        return 0.0
    prompts = sum(config.share_of_rounds(task) * rows_per_rank(config, devices, task) for task in config.tasks)
    prompts /= config.model.sequence_parallel  # ranks with the same prompts encode them between them
    work = prompts * (2 * model.encoders * model.tokens + costs.encode_pictures.flops)
    seconds = work / (ACHIEVED * devices.kind.flops * PRECISION_FACTOR[config.precision])
    if config.model.text_encoders == "offload" and not devices.kind.is_cpu:
        seconds += element * model.encoders / devices.kind.host
    return seconds
