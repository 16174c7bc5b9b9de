"""Foreign LoRA files through diffusers' own converters, with every key accounted for.

The converters of 0.42 drop what they do not know in several places, and each has its own rules for alphas. So the
scale that an alpha asks for is put into the second factor before, and the tensors that pass through carry the names of
the keys they came from: a key that is in no result was dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.models import privates
from opd_ds.models.adapter_keys import ADAPTER_KEY, ALPHA, AUTHORS_NAMES, KOHYA_NAMES, partners, respelled
from opd_ds.models.provenance import sources_of

State = dict[str, Tensor]


class _Traced(Tensor):
    """A tensor that knows which keys of a file went into it."""

    sources: frozenset[str]

    @classmethod
    def of(cls, value: Tensor, keys: frozenset[str]) -> _Traced:
        with torch._C.DisableTorchFunctionSubclass():  # as torch's documentation does it
            traced = value.as_subclass(cls)
        traced.sources = keys
        return traced

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        keys = sources_of((*args, *kwargs.values()))
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **kwargs)
        if isinstance(found, Tensor):
            return cls.of(found, keys)
        if isinstance(found, (tuple, list)) and found and all(isinstance(part, Tensor) for part in found):
            return tuple(cls.of(part, keys) for part in found)
        return found


def without_alphas(name: str, raw: State) -> State:
    """The same LoRA with alpha = rank everywhere and no keys that say so.

    Raises:
        UserError: an alpha that is no positive number, or of no module in the file.
    """
    pairs = partners(raw)
    state = {key: value for key, value in raw.items() if not key.endswith(ALPHA)}
    for key in sorted(raw.keys() - state.keys()):
        value = raw[key]
        first, second = pairs.get(key.removesuffix(ALPHA), ("", ""))
        if first not in state or second not in state:
            raise UserError(f"{name}: {key!r} is the alpha of a module without both factors of a LoRA in the file")
        alpha = float(value) if value.numel() == 1 else math.nan
        if not 0 < alpha < math.inf:
            raise UserError(f"{name}: {key!r} is {value.tolist()}; allowed is one positive number")
        rank = state[first].shape[0]
        if alpha != rank:
            # In float32: the scale of a LoRA in half precision need not be a power of two.
            state[second] = state[second].to(torch.float32) * (alpha / rank)
    return state


def as_diffusers(name: str, state: State, pipeline_class: str) -> State:
    """What `pipeline.load_lora_weights` makes of a file.

    Args:
        name: of the file, for messages.
        state: its factors, without alphas.

    Raises:
        UserError: diffusers does not convert it for this pipeline, or would leave keys out.
    """
    try:
        return _converted(name, state, pipeline_class)
    except UserError as error:
        other = {respelled(key): value for key, value in state.items()}
        if other.keys() == state.keys():
            raise
        try:
            return _converted(name, other, pipeline_class)
        except UserError:
            raise error from None


def not_converted(name: str, keys: Iterable[str], count: int, pipeline_class: str | None) -> UserError:
    """The error for `keys`, of the `count` keys in a file, that no reader knows."""
    known = f" that diffusers converts for {pipeline_class}" if pipeline_class else ""
    strange = sorted(keys)
    return UserError(
        f"{name}: {len(strange)} of {count} keys are not LoRA weights of a transformer{known}, the first: "
        f"{strange[0]!r}; it is for another model or in another form"
    )


def _converted(name: str, state: State, pipeline_class: str) -> State:
    import diffusers

    traced: Mapping[str, Tensor] = {key: _Traced.of(value, frozenset([key])) for key, value in state.items()}
    given = dict(traced) | _alphas_of_ranks(state)
    try:
        found: State = getattr(diffusers, pipeline_class).lora_state_dict(given)
        if not all(map(ADAPTER_KEY.match, found)):
            found = privates.unet_state_dict_to_peft()(found)
    except Exception as error:  # the converters assume their format and fail in as many ways as a file can differ
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{name}: diffusers cannot convert it for {pipeline_class} ({type(error).__name__}: "
            f"{reason[0].rstrip(': ')[:120] if reason else '-'}), its first key: {min(state, default='-')!r}; it is "
            "for another model or in another form"
        ) from error
    converted = tuple(v for key, v in found.items() if ADAPTER_KEY.match(key) and not key.startswith(AUTHORS_NAMES))
    lost = state.keys() - sources_of(converted)
    if lost:
        raise not_converted(name, lost, len(state), pipeline_class)
    with torch._C.DisableTorchFunctionSubclass():
        return {key: value.as_subclass(Tensor) for key, value in found.items()}


def _alphas_of_ranks(state: State) -> State:
    """For names that kohya's scripts write: two converters of these fail where an alpha is missing."""
    return {
        f"{module}{ALPHA}": torch.tensor(float(state[first].shape[0]))
        for module, (first, _) in partners(state).items()
        if module.startswith(KOHYA_NAMES)
    }
