"""LoRA on a network: injection, switching, adapter state dicts, merging.

Keys are handled here by name instead of through `peft.set_peft_model_state_dict`: that function fills in what is
missing (a LoRA without its `lora_B` is a silent no-op) and its prefix rules changed in peft 0.21.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from opd_ds.errors import UserError
from opd_ds.models import privates
from opd_ds.models.adapter_config import FIELDS, rescaled
from opd_ds.models.adapter_files import (
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    adapter_weights,
    is_adapter,
    named_base,
    read_adapter,
    same_base,
)
from opd_ds.models.adapter_keys import ADAPTER_KEY
from opd_ds.models.stored_weights import Stored, StoredTensor
from opd_ds.utils.atomic_io import apply_umask

_MERGED = "merged"
_INJECTING = Lock()
_PARTS = ("lora_A", "lora_B")


def new_adapter(transformer: nn.Module, name: str, config: LoraConfig) -> None:
    """Add a fresh trainable adapter; the base is frozen.

    Raises:
        UserError: no module matches the targets.
    """
    transformer.requires_grad_(False)
    _inject(transformer, name, config)
    activate(transformer, name, trainable=True)


def load_adapter(transformer: nn.Module, name: str, path: Path, pipeline_class: str | None = None) -> None:
    """Add the adapter at `path` as a frozen one, every key accounted for.

    On a network without weights (meta device) this is a check that reads the adapter only.

    Args:
        pipeline_class: as for `read_adapter`.

    Raises:
        UserError: as `read_adapter` and `add_adapter`.
    """
    add_adapter(transformer, name, *read_adapter(path, pipeline_class))


def add_adapter(transformer: nn.Module, name: str, config: LoraConfig, state: dict[str, Tensor]) -> None:
    """Add what `read_adapter` gives as a frozen adapter.

    Raises:
        UserError: missing, unexpected or wrongly shaped keys, naming the first.
    """
    _inject(transformer, name, config)
    own = adapter_parameters(transformer, name)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        parts = [f"{len(keys)} {kind}, the first: {keys[0]!r}" for kind, keys in
                 (("missing", missing), ("unexpected", unexpected)) if keys]  # fmt: skip
        raise UserError(f"adapter keys do not fit this base and the adapter's config: {'; '.join(parts)}")
    for key, parameter in own.items():
        if parameter.shape != state[key].shape:
            raise UserError(
                f"{key!r} has shape {tuple(state[key].shape)}, this base needs {tuple(parameter.shape)}; the adapter "
                "was trained on another base"
            )
        parameter.data.copy_(state[key])
        parameter.requires_grad_(False)


def is_empty(path: Path, pipeline_class: str | None = None) -> bool:
    """Whether the adapter at `path` changes no weight; arguments and errors as for `read_adapter`."""
    state = read_adapter(path, pipeline_class)[1]
    return not any(bool(value.any()) for key, value in state.items() if ".lora_B." in key)


def merge_stored(
    stored: Stored, empty: nn.Module, path: Path, pipeline_class: str | None, dtype: torch.dtype
) -> Stored:
    """Stored weights with the adapter at `path` added where it adapts: in float32, each when it is read.

    Args:
        stored: the weights of the plain network.
        empty: that network on meta; it is used up.
        path, pipeline_class: as for `load_adapter`, which raises the same.
        dtype: to which the network's and the adapter's weights are rounded before they are added, as in training.
    """
    load_adapter(empty, _MERGED, path, pipeline_class)
    state = read_adapter(path, pipeline_class)[1]
    found = dict(stored)
    activate(empty, _MERGED)
    for name, layer in _adapted(empty).items():
        key = f"{name}.weight"
        parts = {f"{part}.{_MERGED}.weight": state[f"{name}.{part}.weight"].to(dtype) for part in _PARTS}
        found[key] = StoredTensor.of(stored[key], partial(_merge, layer, stored[key], parts, dtype))
    return found


def _merge(layer: Any, base: StoredTensor, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    real = copy.deepcopy(layer).to_empty(device="cpu").float()
    with torch.no_grad():
        real.get_base_layer().weight.copy_(base.read().to(dtype))
        for name, value in parts.items():
            real.get_parameter(name).copy_(value)
    real.merge()
    return real.get_base_layer().weight.detach()


def _inject(transformer: nn.Module, name: str, config: LoraConfig) -> None:
    try:
        # On meta PEFT (0.21) exchanges methods of torch's modules meanwhile; two threads would put back the wrong ones.
        with _INJECTING, warnings.catch_warnings():
            # Several adapters on one network is what we want.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            # Nothing is merged into quantized weights.
            warnings.filterwarnings("ignore", message=".*without `get_apply_tensor_subclass`")
            on_meta = next(transformer.parameters()).device.type == "meta"
            inject_adapter_in_model(config, transformer, adapter_name=name, low_cpu_mem_usage=on_meta)
    except ValueError as error:
        raise UserError(f"LoRA targets {_shown(config)} match no module of {type(transformer).__name__}") from error
    if not adapter_parameters(transformer, name):
        raise UserError(f"LoRA targets {_shown(config)} match no module of {type(transformer).__name__}")


def _shown(config: LoraConfig) -> str:
    """The first targets."""
    targets = config.target_modules
    names = targets.replace("\\", "").split("|") if isinstance(targets, str) else sorted(targets or ())
    return f"{names[:4]}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def activate(transformer: nn.Module, name: str, *, trainable: bool = False) -> None:
    """Make `name` the only active adapter; gradients only when `trainable`."""
    for module in _adapted(transformer).values():
        module.set_adapter(name, inference_mode=not trainable)


def _adapted(transformer: nn.Module) -> dict[str, Any]:
    """The modules that adapters were injected into, by name.

    Raises:
        UserError: there are adapters, but in modules of a kind that is not known here.
    """
    kind = privates.tuner_layer_class()
    found = {name: module for name, module in transformer.named_modules() if isinstance(module, kind)}
    if not found and any(map(ADAPTER_KEY.match, dict(transformer.named_parameters()))):
        raise privates.changed("peft", "adapted layers are no BaseTunerLayer")
    return found


@contextmanager
def using(transformer: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, `name` is the only active adapter; None: no adapter is active, and the network is the plain base. Which
    parameters have gradients stays as it is.
    """
    layers = list(_adapted(transformer).values())
    before = [layer.active_adapters for layer in layers]
    try:
        for layer in layers:
            privates.switch_adapter(layer, [] if name is None else [name])
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            privates.switch_adapter(layer, names)


def adapter_parameters(transformer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters, keys as `<module>.lora_A.weight`."""
    found = {}
    for key, parameter in transformer.named_parameters():
        match = ADAPTER_KEY.match(key)
        if match and match["adapter"] == name:
            found[f"{match['module']}.{match['part']}.weight"] = parameter
    return found


def to_store(state: dict[str, Tensor], config: LoraConfig) -> tuple[dict[str, Tensor], LoraConfig]:
    """An adapter's trained weights and its configuration in the form that `save_peft` and `ModelFamily.save_lora`
    write: float32, keys without the adapter's name, and alpha = rank, so that readers of keys alone see its strength.
    """
    stored, kept = rescaled(config, strip_adapter_name(state), 1.0)
    return kept, stored


def strip_adapter_name(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`<module>.lora_A.<adapter>.weight` to the stored form without the adapter's name; other keys are dropped."""
    matches = ((ADAPTER_KEY.match(key), value) for key, value in state.items())
    return {f"{m['module']}.{m['part']}.weight": value.detach().to(torch.float32) for m, value in matches if m}


@torch.no_grad()
def merged_weights(transformer: nn.Module) -> dict[str, Tensor]:
    """The weights of the plain network, adapters added to what they adapt; computed in float32, in place."""
    transformer.float()
    adapted = _adapted(transformer)
    for module in adapted.values():
        module.merge()
    plain = {key: value for key, value in transformer.state_dict().items() if ".lora_" not in key}
    merged = {key.replace(privates.BASE_LAYER, "."): value for key, value in plain.items()}
    if any(f"{name}.weight" not in merged for name in adapted):
        raise privates.changed("peft", f"an adapted layer does not keep its own weights under {privates.BASE_LAYER!r}")
    return merged


def config_fields(transformer: nn.Module, name: str) -> dict[str, Any] | None:
    """What `LoraConfig` is made again from, fit for JSON; None where there is no adapter `name`."""
    config = getattr(transformer, "peft_config", {}).get(name)
    if config is None:
        return None
    values = {field: getattr(config, field) for field in FIELDS}
    return {field: sorted(value) if isinstance(value, set) else value for field, value in values.items()}


def adapter_config(transformer: nn.Module, name: str) -> LoraConfig:
    """The configuration that `new_adapter` or `load_adapter` injected under `name`."""
    return transformer.peft_config[name]  # type: ignore[index]


def save_peft(adapter_state: dict[str, Tensor], config: LoraConfig, folder: Path, base: str) -> None:
    """Write a PEFT folder.

    Args:
        adapter_state: keys as `<module>.lora_A.weight`.
        base: the base's name, as it is recorded in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{key}": value.contiguous() for key, value in adapter_state.items()},
              folder / PEFT_WEIGHTS, {"format": "pt"})  # fmt: skip
    apply_umask(folder / PEFT_WEIGHTS)
    recorded = copy.copy(config)
    recorded.base_model_name_or_path, recorded.inference_mode = base, True
    recorded.save_pretrained(str(folder))


__all__ = [
    "DIFFUSERS_WEIGHTS",
    "PEFT_CONFIG",
    "PEFT_WEIGHTS",
    "activate",
    "adapter_config",
    "adapter_parameters",
    "adapter_weights",
    "add_adapter",
    "config_fields",
    "is_adapter",
    "load_adapter",
    "merge_stored",
    "merged_weights",
    "named_base",
    "new_adapter",
    "read_adapter",
    "rescaled",
    "same_base",
    "save_peft",
    "strip_adapter_name",
    "to_store",
    "using",
]
