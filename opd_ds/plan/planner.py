"""The plan of a run on given devices, and the fastest setting that fits on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Any

from opd_ds.cluster.roles import Answering, Roles
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import BASE
from opd_ds.config.teachers import BaseSection
from opd_ds.errors import UserError
from opd_ds.plan.costs import Costs
from opd_ds.plan.devices import GIB, Devices
from opd_ds.plan.memory import (
    Memory,
    allowance,
    decoding,
    find_teachers,
    largest_rows,
    layout,
    rows_of_a_round,
    run_memory,
    teacher_rank_memory,
)
from opd_ds.plan.network import find_model
from opd_ds.plan.pipeline import overlapped
from opd_ds.plan.rollout_mode import choose_mode
from opd_ds.plan.timing import Seconds, round_seconds
from opd_ds.plan.zero import Phase

AS_FAST = 1.03  # the estimate is no finer than that
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# Shipped ds_configs, from the least sharded on.
_STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload_cpu")
_WHOLE = {"placement": "resident", "deepspeed": None}  # of teachers that have ranks of their own
# What needs no travel first: `auto` is shared where that is possible, else resident.
_PLACEMENTS = ("auto", "offload", "stream", "zero_inference")


@dataclass(frozen=True)
class Plan:
    """What a run needs on `devices`.

    Attributes:
        memory: of a rank that trains.
        teachers: of a rank that holds teachers only, where there are any (`scoring.ranks`).
    """

    config: RunConfig
    devices: Devices
    memory: Memory
    seconds: Seconds
    teachers: Memory | None = None

    @property
    def needed(self) -> float:
        """Bytes on a device with the allowance, on the one that needs most."""
        ranks = [self.memory, *([self.teachers] if self.teachers else [])]
        return max(memory.peak + allowance(memory, self.devices) for memory in ranks)

    @property
    def host_needed(self) -> float:
        """Bytes on a node's host; on CPUs the tensors of its processes too."""
        tensors = self.devices.per_node * self.memory.peak if self.devices.kind.is_cpu else 0.0
        return self.memory.host_peak(self.devices.per_node) + tensors

    @property
    def fills(self) -> float:
        """Bytes needed in parts of what is there, on a device or on a host, whichever is nearer its limit."""
        return max(self.needed / self.devices.kind.memory, self.host_needed / self.devices.host_memory)

    @property
    def fits(self) -> bool:
        return self.fills <= 1


@dataclass(frozen=True)
class Setting:
    """What a search may change: place and speed, no result.

    Attributes:
        placement: of all teachers; None where there is none.
        rollout, train, evaluate: micro-batches.
        decode: images that the VAE decodes at once; None: all of a micro-batch.
    """

    deepspeed: str
    checkpointing: bool
    placement: str | None
    rollout: int
    train: int
    evaluate: int
    decode: int | None

    @property
    def layout(self) -> tuple[str, bool, str | None]:
        """Where things are, whatever the batches."""
        return self.deepspeed, self.checkpointing, self.placement

    def of(self, config: RunConfig) -> RunConfig:
        """`config` with this setting."""
        changes: dict[str, Any] = {
            "deepspeed": self.deepspeed,
            "student": config.student.model_copy(update={"gradient_checkpointing": self.checkpointing}),
            "rollout": config.rollout.model_copy(update={"micro_batch": self.rollout}),
            "train": config.train.model_copy(update={"micro_batch": self.train}),
            "evaluation": config.evaluation.model_copy(update={"micro_batch": self.evaluate}),
            "model": config.model.model_copy(update={"decode_micro_batch": self.decode}),
        }
        if self.placement is not None:
            place = {"placement": self.placement, "deepspeed": None}
            changes["tasks"] = {
                name: task.model_copy(update={"teacher": config.teachers[name].model_copy(update=place)})
                for name, task in config.tasks.items()
            }
            if BASE in config.all_teachers:
                changes["base"] = BaseSection(placement=self.placement, quantize=config.all_teachers[BASE].quantize)
        return config.model_copy(update=changes)

    def overrides(self, config: RunConfig) -> list[str]:
        """As `--set` takes them."""
        lines = [
            f"deepspeed={self.deepspeed}",
            f"student.gradient_checkpointing={str(self.checkpointing).lower()}",
            f"rollout.micro_batch={self.rollout}",
            f"train.micro_batch={self.train}",
            f"evaluation.micro_batch={self.evaluate}",
            f"model.decode_micro_batch={'null' if self.decode is None else self.decode}",
        ]
        if self.placement is not None:
            # Forwards that may be collective: as many on every rank.
            shared = self.placement == "auto" and self.deepspeed.startswith("zero3") and config.rollout.gather != "once"
            if (self.placement == "zero_inference" or shared) and config.scoring.micro_batch == "auto":
                lines.append("scoring.micro_batch=null")
            for name, teacher in config.teachers.items():
                lines.append(f"tasks.{name}.teacher.placement={self.placement}")
                if teacher.deepspeed is not None:
                    lines.append(f"tasks.{name}.teacher.deepspeed=null")
            if BASE in config.all_teachers:
                lines += [f"base.placement={self.placement}", "base.deepspeed=null"]
        return lines


def make_plan(config: RunConfig, costs: Costs, devices: Devices) -> Plan:
    """The run as it is configured, with its rollout mode decided.

    Raises:
        UserError: as a start would, for what the ds_configs say and for `scoring.ranks`.
    """
    if config.rollout.mode == "auto":
        config = config.with_mode(choose_mode(config, costs, devices)[0])
    if config.scoring.ranks:
        return _with_teacher_ranks(config, costs, devices)
    placed = layout(config, costs, devices)
    memory, seconds = run_memory(config, costs, devices, placed), round_seconds(config, costs, devices, placed)
    return Plan(config, devices, memory, seconds)


def _with_teacher_ranks(config: RunConfig, costs: Costs, devices: Devices) -> Plan:
    """Teachers have ranks of their own, and the round is simulated as its phases overlap."""
    roles = Roles(devices.world, config.scoring.ranks)
    training, teaching = replace(devices, count=roles.students), replace(devices, count=roles.teachers)
    placed = layout(config, costs, training)
    teachers = find_teachers(config, costs, teaching, placed.zero, [])
    sharded = any(teacher.placement == "zero_inference" for teacher in teachers)
    answering = Answering(len(teachers), roles.teachers, roles.students, sharded)
    answering.check()
    held = [[teachers[number] for number in answering.held(rank)] for rank in range(roles.teachers)]
    memories = [teacher_rank_memory(config, costs, teaching, own) for own in held]
    phases = dict(round_seconds(config, costs, training, placed).phases)
    scored = round_seconds(config, costs, teaching, replace(placed, teachers=teachers)).phases["score"]
    # Evenly divided that is; a rank that holds more networks, or shares one with fewer ranks, has more to do.
    loads = [sum(1 / len(answering.holders(number)) for number in answering.held(rank)) for rank in range(len(held))]
    phases["score"] = scored * max(loads) * len(loads) / len(teachers)
    rows = rows_of_a_round(config, training)
    visits = config.trained_steps * ceil(rows / config.rollout.micro_batch)
    micro_batches = ceil(rows * config.trained_steps / config.train.micro_batch)
    seconds = Seconds(phases, overlapped(phases, visits, micro_batches, late=bool(config.scoring.late)))
    memory = run_memory(config, costs, training, placed)
    return Plan(config, devices, memory, seconds, max(memories, key=lambda one: one.peak))


def best_split(plan: Plan, costs: Costs) -> Plan | None:
    """The run of `plan`, which has none, with as many teacher ranks as make a round shortest; None where no number of
    them makes it shorter than `plan` has it, or teachers cannot have ranks of their own.
    """
    config, found = plan.config, plan
    possible = config.teachers and config.algorithm.drawn_by == "student"
    for ranks in range(1, plan.devices.count // 2 + 1) if possible and not config.scoring.ranks else ():
        tried = (
            config.with_mode("buffered")
            .with_teachers({name: one.model_copy(update=_WHOLE) for name, one in config.all_teachers.items()})
            .model_copy(update={"scoring": config.scoring.model_copy(update={"ranks": ranks})})
        )
        try:
            split = make_plan(tried, costs, plan.devices)
        except UserError:  # a number of ranks that the ds_config does not go with
            continue
        if split.fits and split.seconds.total < found.seconds.total:
            found = split
    return None if found is plan else found


@dataclass(frozen=True)
class Comparison:
    """A run as it is configured beside the fastest setting that fits.

    Attributes:
        split: the recommended run, or else the configured one, with teachers on ranks of their own, where that is
            faster.
        configured: None where the configured ds_config does not go with the devices.
        problem: why there is no recommendation, or why the configured run has no plan; empty where both are there.
    """

    costs: Costs
    devices: Devices
    configured: Plan | None
    setting: Setting | None
    recommended: Plan | None
    problem: str
    split: Plan | None = None


def compare(config: RunConfig, devices: Devices) -> Comparison:
    """Both plans.

    Raises:
        UserError: the model is unknown, or neither the configured run nor any setting can be planned.
    """
    costs = Costs(find_model(config), config)
    configured = setting = recommended = None
    problems: list[UserError] = []
    try:
        configured = make_plan(config, costs, devices)
    except UserError as error:
        problems.append(error)
    try:
        setting, recommended = fit(config, costs, devices)
    except UserError as error:
        problems.append(error)
    if configured is None and recommended is None:
        raise problems[0]
    plain = recommended or configured
    split = best_split(plain, costs) if plain is not None else None
    return Comparison(costs, devices, configured, setting, recommended, " ".join(map(str, problems)), split)


def settings(config: RunConfig, devices: Devices) -> Iterator[Setting]:
    """The search space, with evaluation and decoding as configured. Stage 0 is left out in half precision: there
    gradients of many micro-batches would add up in it.
    """
    evaluate, decode = config.evaluation.micro_batch, config.model.decode_micro_batch
    pairs = largest_rows(config, devices) // config.train.updates_per_round * config.trained_steps
    fused = config.rollout.mode == "fused"
    rollouts = _up_to(rows_of_a_round(config, devices))
    trains = (config.train.micro_batch,) if fused else _up_to(pairs)
    # Quantized weights are neither moved nor sharded.
    stays = fused or any(teacher.quantize for teacher in config.all_teachers.values())
    placements: tuple[str | None, ...] = (None,)
    if config.teachers:
        apart = [placement for placement in _PLACEMENTS if placement in ("auto", "zero_inference")]
        placements = _PLACEMENTS[:1] if stays else tuple(apart) if config.scoring.ranks else _PLACEMENTS
    for deepspeed in _STAGES[0 if config.precision == "fp32" else 1 : 3 if config.student.quantize else None]:
        for checkpointing in (False, True):
            for placement in placements:
                for rollout in rollouts:
                    for train in trains:
                        yield Setting(deepspeed, checkpointing, placement, rollout, train, evaluate, decode)


def _up_to(most: int) -> tuple[int, ...]:
    return tuple(size for size in _SIZES if size < most) + ((most,) if most <= _SIZES[-1] else ())


def fit(config: RunConfig, costs: Costs, devices: Devices) -> tuple[Setting, Plan]:
    """The fastest setting that fits. Of those that are as fast within 3 %: the plainest layout, the first of
    `settings`, and in it the largest micro-batches, which is where the estimate is least to be trusted.

    Raises:
        UserError: none fits, naming the largest part of the one that comes nearest.
    """
    fitting: list[tuple[Setting, Plan]] = []
    nearest: Plan | None = None
    refused: UserError | None = None
    for setting in settings(config, devices):
        try:  # not every optimizer goes with every stage
            setting, plan = _evaluated_in_less(setting, config, costs, devices)
        except UserError as error:
            refused = error
            continue
        if nearest is None or plan.fills < nearest.fills:
            nearest = plan
        if plan.fits:
            fitting.append((setting, plan))
    if nearest is None and refused is not None:
        raise refused
    if not fitting:
        assert nearest is not None
        raise UserError(_nothing_fits(nearest))
    fastest = min(plan.seconds.total for _, plan in fitting)
    as_fast = [(setting, plan) for setting, plan in fitting if plan.seconds.total <= fastest * AS_FAST]
    plainest = as_fast[0][0].layout
    return max(
        (found for found in as_fast if found[0].layout == plainest), key=lambda found: found[0].rollout * found[0].train
    )


def _evaluated_in_less(setting: Setting, config: RunConfig, costs: Costs, devices: Devices) -> tuple[Setting, Plan]:
    """`setting`, with smaller evaluation micro-batches and decoding image by image as far as only that makes it fit.
    An evaluation is no part of a round: this costs no time that is planned.
    """
    sizes = [setting.evaluate, *(size for size in reversed(_SIZES) if size < setting.evaluate)]
    for evaluate, decode in product(sizes, dict.fromkeys((setting.decode, 1))):
        tried = replace(setting, evaluate=evaluate, decode=decode)
        plan = make_plan(tried.of(config), costs, devices)
        if plan.fits or not _evaluation_decides(plan):
            break
    return tried, plan


def _evaluation_decides(plan: Plan) -> bool:
    """Whether what does not fit is a phase that draws for an evaluation, or that decodes."""
    phases = (Phase.EVALUATE, Phase.DECODE, *decoding(plan.config))
    return plan.needed > plan.devices.kind.memory and plan.memory.worst in phases


def _nothing_fits(plan: Plan) -> str:
    """Why, of the plan that comes nearest to fitting, and what to do."""
    devices, memory = plan.devices, plan.memory
    smaller = ", a LoRA student" if plan.config.student.kind == "full" else ""
    if plan.host_needed / devices.host_memory > plan.needed / devices.kind.memory:
        largest = max([*memory.host, *memory.node], key=lambda part: part.nbytes)
        return (
            f"{devices}: nothing fits; the setting that comes nearest takes {plan.host_needed / GIB:,.0f} GiB of "
            f"{devices.host_memory / GIB:,.0f} GiB of a node's host memory (--host-memory), most of it {largest.name}; "
            f"take more nodes or devices{smaller}, or another placement of the teachers"
        )
    phase = memory.worst
    largest = max((part for part in memory.device if part.alive(phase)), key=lambda part: part.nbytes)
    return (
        f"{devices}: nothing fits; the setting that comes nearest takes {plan.needed / GIB:.1f} GiB of "
        f"{devices.kind.memory / GIB:.1f} GiB a device in phase {phase.value}, most of it {largest.name} "
        f"({largest.nbytes / GIB:.1f} GiB); take more or larger devices{smaller}, or a smaller image"
    )
