"""LoRA in and out: strict reading of released adapters, injection, switching, adapter state dicts.

Keys are handled here by name instead of through `peft.set_peft_model_state_dict`: that function fills in what is
missing (a LoRA without its `lora_B` is a silent no-op) and its prefix rules changed in peft 0.21.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from opd_ds.errors import UserError

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_PREFIX = re.compile(r"^(base_model\.model\.|transformer\.)")
_FIELDS = ("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora")
_ADAPTER_KEY = re.compile(r"^(?P<module>.+)\.(?P<part>lora_[AB])\.(?:(?P<adapter>[^.]+)\.)?weight$")


def is_adapter(path: Path) -> bool:
    """Whether `path` is a LoRA: a PEFT folder, a diffusers LoRA folder, or such a file."""
    return adapter_weights(path) is not None


def adapter_weights(path: Path) -> Path | None:
    """The safetensors file of the adapter at `path`, or None."""
    if path.is_file() and path.suffix == ".safetensors":
        return path
    return next((path / name for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS) if (path / name).is_file()), None)


def read_adapter(path: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and weights, keys as `<module>.lora_A.weight` relative to the transformer.

    Raises:
        UserError: no adapter there, or one whose rank/alpha/targets are not recorded.
    """
    file = adapter_weights(path)
    if file is None:
        raise UserError(f"teacher {path}: no LoRA there; expected {PEFT_WEIGHTS} or {DIFFUSERS_WEIGHTS}")
    with safe_open(file, framework="pt") as stored:
        raw = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (safe_open is no mapping)
        metadata = stored.metadata() or {}
    state = {_PREFIX.sub("", key): value for key, value in raw.items()}
    strange = [key for key in state if not _ADAPTER_KEY.match(key)]
    if strange:
        raise UserError(f"teacher {file}: {len(strange)} keys are not LoRA weights, the first: {strange[0]!r}")
    return _adapter_config(file, metadata, state), state


def _adapter_config(file: Path, metadata: dict[str, str], state: dict[str, Tensor]) -> LoraConfig:
    beside = file.parent / PEFT_CONFIG
    if beside.is_file():
        fields: dict[str, Any] = json.loads(beside.read_text())
    elif "lora_adapter_metadata" in metadata:
        packed = json.loads(metadata["lora_adapter_metadata"])
        fields = {key.removeprefix("transformer."): value for key, value in packed.items()}
    else:
        # Without a recorded alpha diffusers assumes alpha = rank; so do we, with the modules named by the keys.
        rank = next(value.shape[0] for key, value in state.items() if ".lora_A." in key)
        modules = sorted({match["module"] for key in state if (match := _ADAPTER_KEY.match(key))})
        fields = {"r": rank, "lora_alpha": rank, "target_modules": modules}
    config = LoraConfig(**{key: fields[key] for key in _FIELDS if fields.get(key) is not None})
    config.base_model_name_or_path = fields.get("base_model_name_or_path")
    return config


def new_adapter(transformer: nn.Module, name: str, config: LoraConfig) -> None:
    """Add a fresh trainable adapter; the base is frozen.

    Raises:
        UserError: no module matches the targets.
    """
    transformer.requires_grad_(False)
    _inject(transformer, name, config)
    activate(transformer, name, trainable=True)


def load_adapter(transformer: nn.Module, name: str, path: Path) -> None:
    """Add the adapter at `path` as a frozen one, every key accounted for.

    Raises:
        UserError: missing, unexpected or wrongly shaped keys, naming the first.
    """
    config, state = read_adapter(path)
    _inject(transformer, name, config)
    own = adapter_parameters(transformer, name)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        parts = [f"{len(keys)} {kind}, the first: {keys[0]!r}" for kind, keys in
                 (("missing", missing), ("unexpected", unexpected)) if keys]  # fmt: skip
        raise UserError(f"teacher {path}: adapter keys do not fit this base and adapter_config: {'; '.join(parts)}")
    for key, parameter in own.items():
        if parameter.shape != state[key].shape:
            raise UserError(
                f"teacher {path}: {key!r} has shape {tuple(state[key].shape)}, this base needs "
                f"{tuple(parameter.shape)}; the adapter was trained on another base"
            )
        parameter.data.copy_(state[key])
        parameter.requires_grad_(False)


def _inject(transformer: nn.Module, name: str, config: LoraConfig) -> None:
    try:
        with warnings.catch_warnings():
            # Several adapters on one network is what we want.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, transformer, adapter_name=name)
    except ValueError as error:
        targets = sorted(config.target_modules) if config.target_modules else []
        raise UserError(f"LoRA targets {targets} match no module of {type(transformer).__name__}: {error}") from error
    if not adapter_parameters(transformer, name):
        raise UserError(f"LoRA targets {config.target_modules} match no module of {type(transformer).__name__}")


def activate(transformer: nn.Module, name: str, *, trainable: bool = False) -> None:
    """Make `name` the only active adapter; gradients only when `trainable`."""
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(name, inference_mode=not trainable)


def adapter_parameters(transformer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters, keys as `<module>.lora_A.weight`."""
    found = {}
    for key, parameter in transformer.named_parameters():
        match = _ADAPTER_KEY.match(key)
        if match and match["adapter"] == name:
            found[f"{match['module']}.{match['part']}.weight"] = parameter
    return found


def strip_adapter_name(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`<module>.lora_A.<adapter>.weight` to the stored form without the adapter's name; other keys are dropped."""
    matches = ((_ADAPTER_KEY.match(key), value) for key, value in state.items())
    return {f"{m['module']}.{m['part']}.weight": value.detach().to(torch.float32) for m, value in matches if m}


@torch.no_grad()
def merged_weights(transformer: nn.Module) -> dict[str, Tensor]:
    """The weights of the plain network, adapters added to what they adapt; computed in float32, in place."""
    transformer.float()
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    plain = {key: value for key, value in transformer.state_dict().items() if ".lora_" not in key}
    return {key.replace(".base_layer.", "."): value for key, value in plain.items()}


def config_fields(transformer: nn.Module, name: str) -> dict[str, Any] | None:
    """What `LoraConfig` is made again from, fit for JSON; None where there is no adapter `name`."""
    config = getattr(transformer, "peft_config", {}).get(name)
    if config is None:
        return None
    values = {field: getattr(config, field) for field in _FIELDS}
    return {field: sorted(value) if isinstance(value, set) else value for field, value in values.items()}


def adapter_config(transformer: nn.Module, name: str) -> LoraConfig:
    """The configuration that `new_adapter` or `load_adapter` injected under `name`."""
    return transformer.peft_config[name]  # type: ignore[index]
