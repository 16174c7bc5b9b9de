"""Everything a run keeps on one device and on its host, by part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from opd_ds.cluster.roles import Roles
from opd_ds.config.paths import same_place
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import ANCHOR
from opd_ds.config.teachers import QuantizedAs, TeacherSection
from opd_ds.data import rows_on_a_rank
from opd_ds.engine import fill_sizes, frozen_ds_config, state_bytes, student_ds_config
from opd_ds.models import family_class
from opd_ds.plan.costs import Costs
from opd_ds.plan.devices import GIB, Devices
from opd_ds.plan.network import Counts, Model, bytes_of
from opd_ds.plan.passes import passes_at_once, student_passes
from opd_ds.plan.zero import FP32, PINNED, Part, Phase, Placed, Zero, alive_when_reduced, frozen_weights, student_state

# Parameters of reward models that score on the run's device, in float32 unless their options say otherwise.
_REWARDS = {
    "pickscore": 986e6,
    "clipscore": 428e6,
    "hpsv2": 986e6,
    "aesthetic": 428e6,
    "imagereward": 447e6,
    "geneval": 536e6,
}
_HALF = ("bfloat16", "float16")
_WHILE_ASKED = "teachers (while asked)"

# Allowances, on CUDA: context and loaded kernels; NCCL's channels; what the caching allocator cannot use of its blocks.
CONTEXT, NCCL, FRAGMENTATION = 0.6 * GIB, 1.0 * GIB, 0.05
# What `rollout.gather: auto` gives whole weights, of the memory that is free (`engine/replica.py`).
WHOLE_SHARE = 0.5
# Host memory of a process before it holds any tensor: Python, torch, its libraries.
PROCESS = 3.0 * GIB


@dataclass(frozen=True)
class Teacher:
    """One frozen network that serves tasks: LoRAs of one placement share a base.

    Attributes:
        adapters: elements of its LoRAs together.
        zero: how it is sharded; of LoRAs in the student's network (`shared`), how that is under ZeRO-3.
    """

    tasks: tuple[str, ...]
    placement: str
    adapters: int
    zero: Zero | None
    quantize: QuantizedAs | None


@dataclass(frozen=True)
class Memory:
    """Bytes by part: on one device, on the host of one rank, and on the host once for all ranks of a node.

    Attributes:
        notes: what had to be assumed.
    """

    device: list[Part]
    host: list[Part]
    node: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def in_phase(self, phase: Phase) -> float:
        return sum(part.nbytes for part in self.device if part.alive(phase))

    @property
    def worst(self) -> Phase:
        """The phase with the most on the device."""
        return max((phase for phase in Phase), key=self.in_phase)

    @property
    def peak(self) -> float:
        """Bytes of tensors on the device in the worst phase."""
        return self.in_phase(self.worst)

    def host_peak(self, per_node: int) -> float:
        """Bytes on a node: what stays, and the largest of what comes and goes."""
        stays = sum(part.nbytes for part in self.host if part.phases is None)
        passing = max((part.nbytes for part in self.host if part.phases is not None), default=0.0)
        return per_node * (stays + passing) + sum(part.nbytes for part in self.node)


def allowance(memory: Memory, devices: Devices) -> float:
    """What a device loses beside tensors: stated, not measured."""
    if devices.kind.is_cpu:
        return 0.0
    return CONTEXT + (NCCL if devices.count > 1 else 0) + FRAGMENTATION * memory.peak


@dataclass(frozen=True)
class Layout:
    """How the run's networks lie on devices.

    Attributes:
        gathered: the student's weights are whole on every rank while it is asked without a gradient.
        moments: bytes of the optimizer's state for one trained element.
        notes: what had to be assumed.
    """

    zero: Zero
    moments: float
    teachers: list[Teacher]
    gathered: bool
    notes: list[str]


def layout(config: RunConfig, costs: Costs, devices: Devices) -> Layout:
    """Read off the config and its ds_configs.

    Raises:
        UserError: as a start would, for what the ds_configs say and for `model.sequence_parallel`.
    """
    sharing = config.model.sequence_parallel
    Roles(devices.world, sharing=sharing)
    template, source = costs.ds_config(config.deepspeed, "deepspeed")
    completed = student_ds_config(template, config, devices.world, source)
    zero = Zero.of(fill_sizes(completed, costs.student_sizes), devices.count)
    notes: list[str] = []
    if sharing > 1:
        costs.model.family.check_sequences(sharing)
        notes.append(
            f"model.sequence_parallel = {sharing}: activations and work of a pass are divided by {sharing}; what every "
            "rank computes whole (embeddings, keys of the text) and the exchange of tokens are not counted"
        )
    teachers = find_teachers(config, costs, devices, zero, notes)
    if config.scoring.ranks:  # they are elsewhere
        teachers = []
    trained = {name: tuple(one.shape) for name, one in costs.network.named_parameters() if one.requires_grad}
    moments = state_bytes(completed, trained) / sum(map(prod, trained.values()))
    return Layout(zero, moments, teachers, _gathered(config, costs, devices, zero, moments, teachers), notes)


def _gathered(
    config: RunConfig, costs: Costs, devices: Devices, zero: Zero, moments: float, teachers: list[Teacher]
) -> bool:
    """As `StudentEngine` decides it: `auto` wants half of what is free, taken here as all that does not stay."""
    wanted = config.rollout.gather
    if zero.stage < 3 or wanted == "per_layer" or zero.parameters_on_nvme:
        return False
    element, on_cpu = bytes_of(config.precision), devices.kind.is_cpu
    counts = costs.student(zero.threshold)
    copies = config.weight_snapshots
    parts = student_state(counts, config.precision, element, zero, copies, on_cpu=on_cpu, moments=moments).device
    parts += _teachers(config, teachers, costs, element, on_cpu=on_cpu).device
    stays = sum(part.nbytes for part in parts if part.phases is None)
    return wanted == "once" or element * counts.parameters < WHOLE_SHARE * (devices.kind.memory - stays)


def run_memory(
    config: RunConfig, costs: Costs, devices: Devices, placed_as: Layout | None = None, *, rounds_only: bool = False
) -> Memory:
    """Bytes by part.

    Args:
        placed_as: the run's layout, where it is known.
        rounds_only: without evaluation, checkpoints and export.
    """
    model = costs.model
    element, on_cpu = bytes_of(config.precision), devices.kind.is_cpu
    placed_as = placed_as or layout(config, costs, devices)
    zero = placed_as.zero
    counts = costs.student(zero.threshold)
    asked = {Phase.EVALUATE} | ({Phase.ROLLOUT} if config.algorithm.drawn_by == "student" else set())
    asked |= {Phase.SCORE} if config.algorithm.student_snapshots else set()
    student = student_state(
        counts,
        config.precision,
        element,
        zero,
        config.weight_snapshots,
        on_cpu=on_cpu,
        asked=asked,
        gathered=placed_as.gathered,
        moments=placed_as.moments,
        saved=costs.saved(config.student.quantize),
    )
    device, host = list(student.device), list(student.host)

    teachers = _teachers(config, placed_as.teachers, costs, element, on_cpu=on_cpu)
    device += teachers.device
    host += teachers.host
    # Weights are read tensor by tensor, under ZeRO-3 only this rank's share: beside what stays there is one.
    device.append(Part("loading: one tensor", element * costs.student_sizes.largest, frozenset({Phase.LOAD})))
    device += buffer_parts(config, costs, devices)
    device += _activations(config, costs, devices, alive_when_reduced(counts.trained, zero), not rounds_only)
    host.append(Part("activations (offloaded)", PINNED * offloaded_activations(config, costs, devices)))
    encoders = _text_encoders(config, element * model.encoders, on_cpu=on_cpu)
    device += encoders.device
    host += encoders.host
    if not rounds_only or config.learns_from_rewards or _encodes_pictures(config, costs):
        device += _vae(config, costs, devices, element, evaluating=not rounds_only)
    device += _rewards(config)
    if not rounds_only:
        host += _host(config, costs, devices, counts, zero, element)
    return Memory(_without_empty(device), _without_empty(host), _without_empty(teachers.node), placed_as.notes)


def teacher_rank_memory(config: RunConfig, costs: Costs, devices: Devices, teachers: Iterable[Teacher]) -> Memory:
    """Of a rank that holds teachers and nothing else (`scoring.ranks`)."""
    element, on_cpu = bytes_of(config.precision), devices.kind.is_cpu
    placed = _teachers(config, teachers, costs, element, on_cpu=on_cpu)
    batch = batches(config, devices)["score"]
    asked = Part("activations", costs.forward(batch).peak + 2 * costs.inputs(batch), frozenset({Phase.SCORE}))
    prompts = Part("encoded prompts", sum(map(config.samples, config.tasks)) * costs.prompt / devices.count)
    return Memory(_without_empty([*placed.device, asked, prompts]), [Part("process", PROCESS), *placed.host])


def _without_empty(parts: list[Part]) -> list[Part]:
    return [part for part in parts if part.nbytes > 0]


# ---- teachers ----


def find_teachers(config: RunConfig, costs: Costs, devices: Devices, student: Zero, notes: list[str]) -> list[Teacher]:
    """As `TeacherPool` loads them. A teacher that is not on disk is a LoRA when its name says so, else a full
    checkpoint; what is assumed is added to `notes`.
    """
    shared: dict[tuple[str, ...], dict[str, TeacherSection]] = {}
    for task, teacher in config.all_teachers.items():
        is_base = same_place(teacher.path, config.model.path)
        if not is_base and not costs.on_disk(teacher.path):
            named = costs.adapter(teacher.path) is not None
            kind = f"a LoRA of rank {config.student.lora.rank}" if named else "a full checkpoint"
            notes.append(f"teacher of {task}: {teacher.path} is not on disk; taken for {kind}")
        is_lora = not is_base and costs.adapter(teacher.path) is not None
        apart = config.scoring.ranks > 0
        placed = teacher.placed(
            config.teacher_key(task), config.student.kind, is_lora=is_lora, is_base=is_base, apart=apart
        )
        kind = "lora" if is_lora or placed.placement == "shared" else teacher.path
        key = (kind, placed.placement, str(teacher.deepspeed), str(teacher.quantize))
        shared.setdefault(key, {})[task] = placed
    found = []
    for (_, placement, *_), tasks in shared.items():
        first = next(iter(tasks.values()))
        zero = student if placement == "shared" and student.stage == 3 else None
        if placement == "zero_inference":
            template, source = costs.ds_config(first.deepspeed or "zero_inference_gpu", "teacher.deepspeed")
            completed = frozen_ds_config(template, config.precision, devices.count, source)
            zero = Zero.of(fill_sizes(completed, costs.base_sizes), devices.count)
        paths = {teacher.path for teacher in tasks.values() if not same_place(teacher.path, config.model.path)}
        adapters = sum(costs.adapter(path) or 0 for path in paths)
        found.append(Teacher(tuple(tasks), placement, adapters, zero, first.quantize))
    return found


def _text_encoders(config: RunConfig, nbytes: int, *, on_cpu: bool) -> Placed:
    name = "text encoders"
    if config.model.text_encoders == "cached":
        return Placed([], [])
    if config.model.text_encoders == "resident" or on_cpu:
        return Placed([Part(name, nbytes)], [])
    return Placed([Part(name, nbytes, frozenset({Phase.ENCODE}))], [Part(f"{name} (offloaded)", nbytes)])


def _teachers(config: RunConfig, teachers: Iterable[Teacher], costs: Costs, element: int, *, on_cpu: bool) -> Placed:
    """Of those that come to be asked the largest counts: the next one is prefetched only where it fits."""
    placed = [_teacher(config, teacher, costs, element, on_cpu=on_cpu) for teacher in teachers]
    device = [part for one in placed for part in one.device]
    largest: dict[Phase, Part] = {}
    for part in device:
        if part.name == _WHILE_ASKED:
            for phase in part.phases or ():
                largest[phase] = max(largest.get(phase, part), part, key=lambda one: one.nbytes)
    coming = [Part(_WHILE_ASKED, part.nbytes, frozenset({phase})) for phase, part in largest.items()]
    staying = [part for part in device if part.name != _WHILE_ASKED]
    host = [part for one in placed for part in one.host]
    return Placed(staying + coming, host, [part for one in placed for part in one.node])


def _teacher(config: RunConfig, teacher: Teacher, costs: Costs, element: int, *, on_cpu: bool) -> Placed:
    counts = costs.base(teacher.zero.threshold if teacher.zero else 0)
    whole = element * (counts.parameters + counts.buffers + teacher.adapters)
    asked = {
        Phase.ROLLOUT if config.algorithm.drawn_by == "teacher" and task != ANCHOR else Phase.SCORE
        for task in teacher.tasks
    }
    if teacher.placement == "shared":  # adapters in the student's network; ZeRO-3 keeps what is that small whole
        return Placed([Part("teachers (adapters)", element * teacher.adapters)], [])
    if teacher.zero is not None:
        held = Counts(0, counts.parameters + teacher.adapters, counts.buffers, 0, counts.small, counts.unit)
        return frozen_weights(held, element, teacher.zero, asked)
    if teacher.placement in ("offload", "stream") and not on_cpu:
        there = whole if teacher.placement == "offload" else element * (costs.streamed + counts.buffers)
        # Packed into one piece of pinned memory that the ranks of a node share.
        return Placed([Part(_WHILE_ASKED, there, frozenset(asked))], [], [Part("teachers (offloaded)", whole)])
    return Placed([Part("teachers", whole - costs.saved(teacher.quantize))], [])


# ---- what a round keeps and computes ----


def rows_per_rank(config: RunConfig, devices: Devices, task: str) -> int:
    """Trajectories of one task and round on a rank."""
    ranks = devices.count // config.model.sequence_parallel  # those that share sequences have the same samples
    return rows_on_a_rank(config.samples(task), ranks, config.train.updates_per_round)


def largest_rows(config: RunConfig, devices: Devices) -> int:
    """Trajectories of the largest task of a round on a rank."""
    return max(rows_per_rank(config, devices, task) for task in config.tasks)


def rows_of_a_round(config: RunConfig, devices: Devices) -> int:
    """Trajectories on a rank in the round that has most of them."""
    if config.train.schedule != "together":
        return largest_rows(config, devices)
    return sum(rows_per_rank(config, devices, task) for task in config.tasks)


def buffer_bytes(config: RunConfig, model: Model, devices: Devices) -> Mapping[str, float]:
    """Bytes of a rank's `TrajectoryBuffer`s of one round: `states` and what is kept beside them, `scored`."""
    if config.rollout.mode == "fused":
        return {"states": 0, "scored": 0}
    latent = bytes_of(config.precision) * prod(model.family.latent_shape)
    passes = family_class(config.model.family).passes
    kept = [rows_per_rank(config, devices, task) * config.kept_velocities(task, passes) for task in config.tasks]
    return {
        "states": rows_of_a_round(config, devices) * config.trained_steps * latent * (1 + config.kept_per_state),
        "scored": config.trained_steps * latent * (sum(kept) if config.train.schedule == "together" else max(kept)),
    }


def waiting_bytes(config: RunConfig, model: Model, devices: Devices) -> float:
    """Bytes of a rank's buffers of the next round, which a checkpoint keeps as well; nothing without `scoring.late`."""
    return config.scoring.late * sum(buffer_bytes(config, model, devices).values())


def buffer_parts(config: RunConfig, costs: Costs, devices: Devices) -> list[Part]:
    """The buffer and the encoded prompts, with the copies that are made of them on the way."""
    sizes = buffer_bytes(config, costs.model, devices)
    every = rows_of_a_round(config, devices)
    training = frozenset({Phase.TRAIN, Phase.REDUCE})
    later = training | {Phase.ROLLOUT, Phase.SCORE, Phase.STEP}
    single = largest_rows(config, devices) / every * sizes["scored"]
    waiting: list[Part] = []
    if config.scoring.late:
        always = frozenset(Phase) - {Phase.LOAD}
        waiting = [
            Part("trajectory buffer: waiting", waiting_bytes(config, costs.model, devices), always),
            Part("encoded prompts: waiting", every * costs.prompt, always),
        ]
    return [
        *waiting,
        Part("trajectory buffer", sizes["states"], later),
        # Without teachers micro-batches are joined: both are there for a moment.
        Part("trajectory buffer: joining", sizes["states"] * (not config.teachers), frozenset({Phase.ROLLOUT})),
        Part("trajectory buffer: scored", sizes["scored"], training | {Phase.SCORE, Phase.STEP}),
        Part("trajectory buffer: joining", single, frozenset({Phase.SCORE})),
        Part("encoded prompts", every * costs.prompt, later | {Phase.ENCODE}),
        Part("reference pictures", every * costs.encode_pictures.saved, later | {Phase.ENCODE}),
        Part("encoded prompts", every * costs.prompt, frozenset({Phase.ROLLOUT})),
    ]


def batches(config: RunConfig, devices: Devices) -> dict[str, int]:
    """Rows of the largest forward, guidance included: `rollout`, `score`, `train` (all that one backward needs),
    `evaluate`.
    """
    rows = largest_rows(config, devices)
    pairs = rows * config.trained_steps
    trained = pairs // config.train.updates_per_round
    student = max(student_passes(config, task) for task in config.tasks)
    passes = frozen_passes(config)
    asked = passes_at_once(config, passes)
    fused = config.rollout.mode == "fused"
    by_teacher = config.algorithm.drawn_by == "teacher"
    alone = by_teacher or not config.teachers
    rollout = min(config.rollout.micro_batch, rows if alone else rows_of_a_round(config, devices))
    return {
        "rollout": rollout * passes_at_once(config, passes if by_teacher else student),
        "score": (min(rollout, rows) if fused else min(config.scoring_micro_batch, pairs)) * asked,
        "train": (rollout if fused else min(config.train.micro_batch, trained)) * student,
        "evaluate": config.evaluation.micro_batch * passes_at_once(config, max(student, passes)),
    }


def frozen_passes(config: RunConfig) -> int:
    """Passes of the most expensive frozen network's guided velocity."""
    asked = [teacher.guidance for teacher in config.all_teachers.values()]
    asked += [guidance for task in config.tasks for guidance in config.queried_guidances(task)]
    return max(map(family_class(config.model.family).passes, asked), default=1)


def _activations(
    config: RunConfig, costs: Costs, devices: Devices, when_reduced: float, evaluating: bool
) -> list[Part]:
    sizes = batches(config, devices)
    checkpointing = bool(config.student.gradient_checkpointing)
    name = "activations"

    def taken(batch: int) -> float:
        return 2 * costs.inputs(batch)  # rows of the buffer, and their guided doubles

    cost = costs.train(sizes["train"], checkpointing=checkpointing)
    train = cost.peak - offloaded_activations(config, costs, devices)
    if config.rollout.mode == "fused":
        train += costs.forward(sizes["score"]).peak
    parts = [
        Part(name, costs.forward(sizes["rollout"]).peak + taken(sizes["rollout"]), frozenset({Phase.ROLLOUT})),
        Part(name, train + taken(sizes["train"]), frozenset({Phase.TRAIN})),
        Part(name, when_reduced * train + taken(sizes["train"]), frozenset({Phase.REDUCE})),
    ]
    if config.frozen_velocities and not config.scoring.ranks:
        parts.append(Part(name, costs.forward(sizes["score"]).peak + taken(sizes["score"]), frozenset({Phase.SCORE})))
    if evaluating:
        batch = sizes["evaluate"]
        parts.append(Part(name, costs.forward(batch).peak + taken(batch), frozenset({Phase.EVALUATE})))
    return parts


def offloaded_activations(config: RunConfig, costs: Costs, devices: Devices) -> float:
    """Bytes that wait on the host of a rank from forward to backward."""
    if config.student.gradient_checkpointing != "offload" or devices.kind.is_cpu:
        return 0.0
    return costs.train(batches(config, devices)["train"], checkpointing=True).saved


def _vae(config: RunConfig, costs: Costs, devices: Devices, element: int, *, evaluating: bool) -> list[Part]:
    """Loaded at the first image or reference picture, then kept. Where rewards are learned from, images are decoded
    beside the rollout, or beside the teachers' queries.
    """
    parts = [Part("VAE", element * costs.model.vae_parameters)]
    if _encodes_pictures(config, costs):
        parts.append(Part("VAE encode", costs.encode_pictures.peak, frozenset({Phase.ENCODE})))
    if evaluating:
        decode = decoded_bytes(config, costs, config.evaluation.micro_batch)
        parts.append(Part("VAE decode", decode, frozenset({Phase.DECODE})))
    if config.learns_from_rewards:
        drawn = min(config.rollout.micro_batch, largest_rows(config, devices))
        parts.append(Part("VAE decode", decoded_bytes(config, costs, drawn), decoding(config)))
    return parts


def decoding(config: RunConfig) -> frozenset[Phase]:
    """The phases of a round beside which images are decoded; `DECODE`, an evaluation's, where no rewards are learned
    from. Those of the last rollouts are decoded while the start is asked.
    """
    if not config.learns_from_rewards:
        return frozenset({Phase.DECODE})
    return frozenset({Phase.SCORE} if config.teachers else {Phase.ROLLOUT, Phase.SCORE})


def _encodes_pictures(config: RunConfig, costs: Costs) -> bool:
    return bool(costs.model.pictures) and config.model.text_encoders != "cached"


def decoded_bytes(config: RunConfig, costs: Costs, images: int) -> float:
    """The most that decoding so many images takes: those that the VAE works on; what is done leaves the device."""
    return costs.decode(min(images, config.model.decode_micro_batch or images)).peak


def _rewards(config: RunConfig) -> list[Part]:
    parts = []
    for label, reward in config.rewards.items():
        size = FP32 // 2 if reward.options.get("dtype") in _HALF else FP32
        if reward.options.get("device", "") != "cpu":
            parts.append(Part(f"reward {label}", size * _REWARDS.get(reward.name, 0)))
    return parts


# ---- the host ----


def _host(config: RunConfig, costs: Costs, devices: Devices, counts: Counts, zero: Zero, element: int) -> list[Part]:
    """Beside what is offloaded: the process, and what loading, checkpoints and the export need for a while."""
    owned = counts.trained / zero.world  # at stage 0 all hold everything and each writes its part
    saved = FP32 * owned * (3 + config.weight_snapshots) + waiting_bytes(config, costs.model, devices)
    background = config.run.checkpoint_in_background
    passing = frozenset({Phase.EVALUATE})
    exported = (element + FP32) * (counts.parameters + counts.buffers) if config.student.kind == "full" else 0
    return [
        Part("process", PROCESS),
        Part("loading: one tensor", element * costs.student_sizes.largest, passing),
        Part("checkpoint", saved, None if background else passing),
        # Rank 0 alone; counted on every rank of its node it would be eightfold.
        Part("export", exported / min(zero.world, 8), passing),
    ]
