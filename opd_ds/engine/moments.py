"""What an optimizer keeps of each weight: in bytes, and as checkpoints carry it, for any fragment, 1-D by kind.

Most keep float32 tensors in the shape of what they update. bitsandbytes keeps codes of 8 bits and a scale for each
block of the flat tensor (small tensors in float32), and other ranks and stages cut other blocks: carried are each
element's code (uint8) and scale. So codes come back as they were where blocks are the same, and elsewhere as values
that are rounded to the new block's scale. Adafactor keeps sums over rows and columns; there each weight is a fragment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from opd_ds.engine.ds_settings import zero_stage
from opd_ds.engine.fragments import Fragment
from opd_ds.engine.shards import ShardReader

_CODED = {"state1": "exp_avg", "state2": "exp_avg_sq"}  # of bitsandbytes (0.50); the first is signed
_CODE, _SCALE, _BLOCK, _SMALLEST = "_code", "_scale", 256, 4096
_SUMMED = ("row_var", "col_var")  # of torch's Adafactor
_FLOAT = 4
# Tensors of state for each weight, where that is not two.
_TENSORS = {"Adagrad": 1, "Lion": 1, "RMSprop": 1, "SGD": 0, "Adafactor": 1}
_NOT_FOR_MUON = ("embed", "lm_head")  # as DeepSpeed (0.19.8, set_optimizer_flags) tells them


def state_bytes(ds_config: dict[str, Any], shapes: Mapping[str, Sequence[int]]) -> float:
    """Bytes that the optimizer of a complete ds_config keeps of all trained weights together.

    Args:
        shapes: of the weights, by name.
    """
    kind, flattened = ds_config["optimizer"]["type"], zero_stage(ds_config) > 0
    total = 0.0
    for name, shape in shapes.items():
        numel = prod(shape)
        if kind == "AdamW8bit" and (flattened or numel >= _SMALLEST):
            total += 2 * (numel + _FLOAT * numel / _BLOCK)
        elif kind == "Adafactor" and len(shape) > 1:
            total += _FLOAT * (numel // shape[-1] + numel // shape[-2])
        elif kind == "Muon" and by_muon(name, shape):
            total += _FLOAT * numel
        else:
            total += _FLOAT * numel * _TENSORS.get(kind, 2)
    return total


def by_muon(name: str, shape: Sequence[int]) -> bool:
    """Whether DeepSpeed's Muon orthogonalizes the weight; otherwise its Adam updates it."""
    return len(shape) > 1 and not any(word in name.lower() for word in _NOT_FOR_MUON)


def carried(state: dict[str, Any], fragment: Fragment) -> Iterator[tuple[str, Tensor]]:
    """By kind, what belongs to the fragment in `state`, which is of its flat tensor."""
    for name, value in state.items():
        if name in _CODED:
            yield from _codes(state, name, fragment)
        elif name in _SUMMED:
            yield name, value.flatten()
        elif isinstance(value, Tensor) and value.numel() == fragment.flat.numel() and value.dim() > 0:
            yield name, fragment.of(value)


def restore(inner: Any, parts: list[Fragment], shards: ShardReader, kinds: set[str]) -> dict[str, Any]:
    """Fill the state of one flat tensor, made here where it is not there yet; returns it.

    Args:
        inner: the optimizer.
        parts: all fragments of the flat tensor.
        kinds: that the checkpoint holds of them.

    Raises:
        DamagedCheckpointError: a part is in none of the files.
    """
    flat = parts[0].flat
    if type(inner).__module__.startswith("bitsandbytes"):
        return _restore_coded(inner, parts, shards)
    state: dict[str, Any] = inner.state[flat]  # made by this look-up
    for kind in kinds:
        if kind not in state:
            state[kind] = flat.new_zeros(_shape(kind, flat))
        for part in parts:
            place = state[kind].view(-1) if kind in _SUMMED else part.of(state[kind])
            place.copy_(shards.read(kind, part.name, part.start, place.numel()))
    return state


def _shape(kind: str, flat: Tensor) -> tuple[int, ...]:
    if kind == "row_var":
        return (*flat.shape[:-1], 1)
    return (*flat.shape[:-2], 1, flat.shape[-1]) if kind == "col_var" else tuple(flat.shape)


# ---- bitsandbytes ----


def _codes(state: dict[str, Any], name: str, fragment: Fragment) -> Iterator[tuple[str, Tensor]]:
    kind, there = _CODED[name], torch.arange(fragment.offset, fragment.offset + fragment.numel)
    values = fragment.of(state[name]).to("cpu", copy=True)
    if values.dtype == torch.uint8:
        yield kind + _SCALE, state[_numbered("absmax", name)].cpu()[there // _BLOCK]
        kind += _CODE
    yield kind, values


def _restore_coded(inner: Any, parts: list[Fragment], shards: ShardReader) -> dict[str, Any]:
    flat, group = parts[0].flat, parts[0].group
    settings = inner.param_groups[group]
    before, settings["params"] = settings["params"], [flat]  # under ZeRO-3 a group has its tensor during a step only
    inner.init_state(settings, flat, group, 0)
    settings["params"] = before
    state: dict[str, Any] = inner.state[flat]
    for name, kind in _CODED.items():
        values, scales = torch.zeros(2, flat.numel())
        for part in parts:
            there = slice(part.offset, part.offset + part.numel)
            values[there], scales[there] = _read(kind, part, shards, signed=name == "state1")
        if state[name].dtype == torch.uint8:
            values, highest = _coded(values, scales, state[_numbered("qmap", name)].cpu())
            state[_numbered("absmax", name)].copy_(highest)
        state[name].view(-1).copy_(values)
    return state


def _numbered(word: str, name: str) -> str:
    return name.replace("state", word)


def _read(kind: str, part: Fragment, shards: ShardReader, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Values and scales [n] of a fragment; of one that was kept in float32 no scales: zeros."""
    from bitsandbytes.functional import create_dynamic_map

    def saved(name: str) -> Tensor:
        return shards.read(name, part.name, part.start, part.numel)

    if kind + _CODE not in shards.kinds_of(part.name):
        return saved(kind), torch.zeros(part.numel)
    scales = saved(kind + _SCALE)
    return create_dynamic_map(signed=signed)[saved(kind + _CODE).long()] * scales, scales


def _coded(values: Tensor, scales: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n] and scales [blocks]. A block whose values had one scale keeps it; padding has none, and is 0."""
    numel, blocks = values.numel(), -(-values.numel() // _BLOCK)
    values, scales = pad(torch.stack([values, scales]), (0, blocks * _BLOCK - numel)).view(2, blocks, _BLOCK)
    highest = scales.amax(1)
    lowest = torch.where(scales > 0, scales, highest[:, None]).amin(1)
    largest = values.abs().amax(1)
    absmax = torch.where((lowest == highest) & (highest >= largest), highest, largest)
    shares = values / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares.contiguous(), (table[1:] + table[:-1]) / 2)
    return codes.view(-1)[:numel].to(torch.uint8), absmax
