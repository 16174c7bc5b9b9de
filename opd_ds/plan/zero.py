"""What DeepSpeed keeps of a network on one rank, by ZeRO stage. As in DeepSpeed 0.19 (docs/plan.md has the table)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import ceil
from typing import Any

from opd_ds.plan.network import Counts

FP32 = 4
# torch's allocator of pinned memory rounds every tensor up to a power of two; what we pin ourselves is packed.
PINNED = 1.5
_OFFLOADS = ("offload_optimizer", "offload_param")
_DEFAULT_BUCKET, _PLAIN_BUCKET = 500_000_000, 500_000_000  # elements; the second is fixed in DeepSpeed's stage 0


class Phase(StrEnum):
    """Stretches of a run in which other things are alive; the plan takes the worst."""

    LOAD = "load"
    ENCODE = "encode"
    ROLLOUT = "rollout"
    SCORE = "score"
    TRAIN = "train"
    REDUCE = "reduce"
    STEP = "step"
    EVALUATE = "evaluate"
    DECODE = "decode"


@dataclass(frozen=True)
class Part:
    """Bytes on one device under a name, in some phases; None: in all of them."""

    name: str
    nbytes: float
    phases: frozenset[Phase] | None = None

    def alive(self, phase: Phase) -> bool:
        return self.phases is None or phase in self.phases


@dataclass(frozen=True)
class Zero:
    """The numbers of a ds_config that decide about memory, defaults filled in; sizes in elements."""

    stage: int
    world: int
    offload_optimizer: bool = False
    offload_param: bool = False
    nvme: bool = False
    pinned: bool = False  # what is offloaded to the host, by DeepSpeed
    parameters_on_nvme: bool = False
    reduce_bucket: int = _DEFAULT_BUCKET
    buffers: int = 1
    prefetch: int = 50_000_000
    max_live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    threshold: int = 100_000
    sub_group: int = 1_000_000_000
    gather: int = 1  # ranks among which weights are gathered, where that is fewer than all (hpZ)

    @staticmethod
    def of(ds_config: dict[str, Any], world: int) -> Zero:
        """From a ds_config, complete or not."""
        zero = ds_config.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        places = [zero.get(key, {}).get("device", "none") for key in _OFFLOADS]
        overlap = zero.get("overlap_comm", stage == 3)
        plain = Zero(stage, world)
        return Zero(
            stage=stage,
            world=world,
            offload_optimizer=places[0] in ("cpu", "nvme"),
            offload_param=places[1] in ("cpu", "nvme"),
            nvme="nvme" in places,
            pinned=any(zero[key].get("pin_memory", True) for key in _OFFLOADS if key in zero),
            parameters_on_nvme=places[1] == "nvme",
            reduce_bucket=int(zero.get("reduce_bucket_size", plain.reduce_bucket)),
            buffers=2 if overlap and stage in (1, 2) else 1,
            prefetch=int(zero.get("stage3_prefetch_bucket_size", plain.prefetch)),
            max_live=int(zero.get("stage3_max_live_parameters", plain.max_live)),
            reuse=int(zero.get("stage3_max_reuse_distance", plain.reuse)),
            threshold=int(zero.get("stage3_param_persistence_threshold", plain.threshold)),
            sub_group=int(zero.get("sub_group_size", plain.sub_group)),
            gather=max(int(zero.get("zero_hpz_partition_size", 1)), 1),
        )


@dataclass(frozen=True)
class Placed:
    """A network's bytes on the device, on the host of its rank, and on the host once for all ranks of a node."""

    device: list[Part]
    host: list[Part]
    node: list[Part] = field(default_factory=list)


def frozen_weights(counts: Counts, element: int, zero: Zero, asked: Collection[Phase]) -> Placed:
    """A network without gradients under ZeRO-3 (ZeRO-Inference), and when it is asked."""
    return _sharded_weights(counts, element, zero, "teachers", asked, trained=False)


def student_state(
    counts: Counts,
    precision: str,
    element: int,
    zero: Zero,
    copies: int,
    *,
    on_cpu: bool,
    asked: Collection[Phase] = (Phase.ROLLOUT, Phase.EVALUATE),
    gathered: bool = False,
    saved: float = 0.0,
    moments: float = 2 * FP32,
) -> Placed:
    """Weights, masters, gradients, optimizer state and copies of a trained network.

    Args:
        copies: further sets of the fp32 masters (averages and the like).
        on_cpu: the device is a CPU: pages of buffers that are never written do not count, and torch's Adam works
            tensor by tensor.
        asked: when this network is asked without a gradient (frozen policies are, with their weights in its place).
        gathered: the weights are whole on every rank while the network is asked without a gradient.
        moments: bytes of the optimizer's state for one trained element.
        saved: bytes that frozen weights lose by quantization; not at stage 3.
    """
    trained = counts.trained
    shard = trained / zero.world if zero.stage else trained
    device, host = [], []
    if zero.stage == 3:
        weights = _sharded_weights(counts, element, zero, "student weights", asked, trained=True, gathered=gathered)
        device += weights.device
        host += weights.host
    else:
        device.append(Part("student weights", element * (counts.parameters + counts.buffers) - saved))
    states = host if zero.offload_optimizer else device
    masters = 0 if zero.stage == 0 and precision == "fp32" else FP32 * shard
    pinned = PINNED if zero.offload_optimizer and zero.pinned else 1
    states.append(Part("fp32 masters", pinned * masters))
    states.append(Part("optimizer state", pinned * moments * shard))
    states.append(Part("weight copies", copies * FP32 * shard))
    gradients = _gradients(trained, shard, precision, element, zero)
    phases = {Phase.TRAIN, Phase.REDUCE, Phase.STEP}
    if _copies_gradients(precision, zero):  # flattened for the optimizer they are another tensor
        phases.discard(Phase.STEP)
        if zero.stage == 1:  # they move into the bucket, parameter by parameter
            phases.discard(Phase.REDUCE)
            left = element * (trained - min(zero.reduce_bucket, trained))
            states.append(Part("gradients", left, frozenset({Phase.REDUCE})))
    # At stage 3 a buffer from the start; BF16_Optimizer, too, sets its gradients to zero and keeps them.
    always = zero.stage == 3 or _by_bf16_optimizer(precision, zero)
    states.append(Part("gradients", gradients, None if always else frozenset(phases)))
    device += _reduction(trained, shard, precision, element, zero, on_cpu=on_cpu)
    states.append(Part("optimizer step", _step(counts, shard, precision, zero, on_cpu=on_cpu), frozenset({Phase.STEP})))
    return Placed(device, host)


def _sharded_weights(
    counts: Counts,
    element: int,
    zero: Zero,
    name: str,
    passes: Collection[Phase],
    *,
    trained: bool,
    gathered: bool = False,
) -> Placed:
    """ZeRO-3's: this rank's share; small parameters whole; buffers whole; and what is gathered while it works.

    A block is gathered as one, with the next ones on their way, in a flat tensor that is copied out of. After the first
    rounds DeepSpeed knows the order of modules and leaves a parameter in place when it is used again within `reuse`
    elements: the last half of that before the turn from forward to backward. A forward without a gradient begins as
    the one that it remembers, so there, too, they stay, and until the next backward.
    """
    if zero.world == 1 and not zero.offload_param:  # nothing is gathered, the shard is the parameter
        share = float(counts.parameters)
        small = whole = 0
    else:
        share = counts.parameters / zero.world
        small = counts.small
        whole = counts.parameters - small
    coming = min(zero.prefetch, zero.max_live)
    stays = min(whole, zero.reuse / 2) if trained else 0.0
    live = min(whole, counts.unit + coming + stays) + min(whole, max(counts.unit, coming))
    device = [Part(name, element * ((0 if zero.offload_param else share) + small + counts.buffers))]
    if zero.gather > 1:
        # Of trained weights it ends with the step that changes them, and comes with the next gather.
        until = frozenset(set(Phase) - {Phase.LOAD, Phase.ENCODE}) if trained else None
        device.append(Part(f"{name}: second shard (hpZ)", element * counts.parameters / zero.gather, until))
    called = Part(f"{name}: whole", element * whole) if gathered else Part(f"{name}: gathered", element * live)
    device.append(replace(called, phases=frozenset(passes)))
    if trained:
        left = alive_when_reduced(counts.trained, zero)
        device.append(Part(f"{name}: gathered", element * live, frozenset({Phase.TRAIN})))
        device.append(Part(f"{name}: gathered", element * left * live, frozenset({Phase.REDUCE})))
        if not gathered:
            device.append(Part(f"{name}: gathered", element * stays, frozenset({Phase.SCORE} - set(passes))))
    nbytes = element * share * (PINNED if zero.pinned else 1)
    host = [Part(f"{name} (offloaded)", nbytes)] if zero.offload_param and not zero.nvme else []
    return Placed(device, host)


def alive_when_reduced(trained: int, zero: Zero) -> float:
    """The share of a backward that is still to come when the first bucket of gradients is full: of activations, and of
    gathered weights, that are still there.
    """
    return max(0.0, 1 - min(zero.reduce_bucket, trained) / trained) if zero.stage else 0.0


def _accumulates_in_fp32(precision: str, zero: Zero) -> bool:
    """Whether gradients of several micro-batches add up in another dtype than the network's."""
    return precision == "bf16" and zero.stage > 0


def _by_bf16_optimizer(precision: str, zero: Zero) -> bool:
    """Stage 1 in bf16 is a class of its own in DeepSpeed: one flat gradient in float32, reduced in bf16."""
    return zero.stage == 1 and _accumulates_in_fp32(precision, zero)


def _copies_gradients(precision: str, zero: Zero) -> bool:
    return zero.stage in (1, 2) and not _accumulates_in_fp32(precision, zero)


def _gradients(trained: float, shard: float, precision: str, element: int, zero: Zero) -> float:
    """What lives from micro-batch to micro-batch."""
    if _by_bf16_optimizer(precision, zero):  # those of the network, and their sum
        return (element + FP32) * trained
    accumulated = FP32 if _accumulates_in_fp32(precision, zero) else element
    return accumulated * (shard if zero.stage >= 2 else trained)  # stage 1 shards optimizer states only


def _reduction(trained: int, shard: float, precision: str, element: int, zero: Zero, *, on_cpu: bool) -> list[Part]:
    """Buckets that gradients are gathered in, and their copies while they are reduced."""
    used = min(zero.reduce_bucket, trained)
    reduce = frozenset({Phase.REDUCE})
    name = "reduction buckets"
    if zero.stage == 0:
        return [Part("reduction", element * min(_PLAIN_BUCKET, trained), reduce)]
    if zero.stage == 3:
        return [
            Part(name, element * (used if on_cpu else zero.reduce_bucket)),
            Part("reduction", element * used, reduce),
        ]
    if _by_bf16_optimizer(precision, zero):
        return [Part("reduction", element * trained, reduce)]
    # A rank's own share is copied out of the bucket; where it is the accumulated gradient, it is added there.
    kept = 0.0 if _accumulates_in_fp32(precision, zero) else element * shard
    copies = max(element * used, kept) if used == trained else element * used + kept
    if on_cpu:
        filled = min(zero.buffers, ceil(trained / zero.reduce_bucket))
        return [Part(name, element * used * filled, reduce), Part("reduction", copies, reduce)]
    whole = element * zero.reduce_bucket * zero.buffers
    return [Part(name, whole, reduce | {Phase.TRAIN}), Part("reduction", copies, reduce)]


def _step(counts: Counts, shard: float, precision: str, zero: Zero, *, on_cpu: bool) -> float:
    """Gradients as the optimizer takes them, and Adam's own temporaries: two tensors of the size of the largest that it
    updates where it works tensor by tensor, one for everything where it takes lists (on CUDA).
    """
    if zero.offload_optimizer:  # DeepSpeed's CPU Adam takes the gradients where they are
        return 0
    updated = min(shard, zero.sub_group) if zero.stage == 3 else shard
    copied = zero.stage == 3 or _copies_gradients(precision, zero) or (zero.stage == 0 and precision != "fp32")
    gradients = FP32 * updated if copied else 0
    return gradients + (2 * FP32 * (updated if zero.stage else counts.largest) if on_cpu else FP32 * updated)
