"""The configuration of a LoRA: which fields of PEFT's decide what it computes, and the scale of B A.

Fields are on an allow list. What PEFT adds in a later version is therefore refused by name until someone has looked
whether it changes what an adapter computes.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from opd_ds.errors import UserError, shown
from opd_ds.models import privates

# What `LoraConfig` is made again from.
FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
)
# Records, and what decided about training: with the weights at hand they change nothing. Read in PEFT 0.18 to 0.21.
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
# The others (pissa, olora, corda, loftq, lora_ga, mica) also change the base's weights, or freeze a factor.
_INITS_OF_FACTORS = (None, True, False, "gaussian", "eva", "orthogonal")
_DEFAULTS = LoraConfig().to_dict()


def lora_config(fields: Mapping[str, Any], where: str) -> LoraConfig:
    """The configuration that `fields` describe.

    Args:
        where: the file that they are in, for messages.

    Raises:
        UserError: another method than LoRA, a field that changes what the adapter computes and that is not supported,
            or a rank or alpha that is not a positive number.
    """
    kind = fields.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{where}: peft_type = {kind!r}; allowed is 'LORA'")
    init = fields.get("init_lora_weights")
    if init not in _INITS_OF_FACTORS:
        raise UserError(
            f"{where}: init_lora_weights = {init!r} also changes the base's weights; save the LoRA with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it a plain one"
        )
    for name, value in fields.items():
        if name in FIELDS or name in _WITHOUT_EFFECT or name == "init_lora_weights":
            continue
        if value and value != _DEFAULTS.get(name):
            raise UserError(
                f"{where}: {name} = {_short(value)} changes what the adapter computes and is not supported; allowed "
                "are plain LoRAs: merge it into its base elsewhere and give the full checkpoint"
            )
    _refuse_numbers(fields, where)
    _refuse_names(fields.get("target_modules"), where)
    try:
        config = LoraConfig(**{key: fields[key] for key in FIELDS if fields.get(key) is not None})
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: PEFT does not accept it ({str(error).splitlines()[0]})") from error
    if not config.target_modules:
        raise UserError(f"{where}: target_modules is missing; the names of the adapted modules are needed")
    config.base_model_name_or_path = fields.get("base_model_name_or_path")
    return config


def _refuse_numbers(fields: Mapping[str, Any], where: str) -> None:
    for name, by_module, kind in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", (int, float))):
        named = {name: fields[name]} if fields.get(name) is not None else {}
        pattern = fields.get(by_module) or {}
        if not isinstance(pattern, Mapping):
            raise UserError(f"{where}: {by_module} = {_short(pattern)}; allowed is a number for each named module")
        named |= {f"{by_module} of {module!r}": value for module, value in pattern.items()}
        for what, value in named.items():
            if not isinstance(value, kind) or not 0 < value < math.inf:
                raise UserError(f"{where}: {what} = {_short(value)}; allowed is a positive number")


def _refuse_names(targets: Any, where: str) -> None:
    if targets is None or isinstance(targets, str):
        return
    if not isinstance(targets, list | tuple | set) or not all(isinstance(name, str) for name in targets):
        raise UserError(f"{where}: target_modules = {_short(targets)}; allowed are a list of names and one expression")


def _short(value: Any) -> str:
    return shown(value, 60)


def exact_fields(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Fields of a LoraConfig that adapts exactly these modules, each with its own rank and alpha."""
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))

    def others(values: Mapping[str, float], usual: float) -> dict[str, float]:
        # Patterns are regular expressions that otherwise match the end of a name.
        return {f"^{re.escape(module)}": value for module, value in values.items() if value != usual}

    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": others(ranks, r),
        "alpha_pattern": others(alphas, alpha),
        "target_modules": list(ranks),
    }


def rank_of(config: LoraConfig, module: str) -> int:
    """The rank that the configuration names for `module`."""
    return config.rank_pattern.get(privates.pattern_key()(list(config.rank_pattern), module), config.r)


def scale(config: LoraConfig, module: str) -> float:
    """The factor on B A."""
    rank = rank_of(config, module)
    alpha = config.alpha_pattern.get(privates.pattern_key()(list(config.alpha_pattern), module), config.lora_alpha)
    return float(alpha / (rank**0.5 if config.use_rslora else rank))


def rescaled(config: LoraConfig, state: Mapping[str, Tensor], factor: float) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The same function with `factor` on B A in every module: what else the scale was is in B.

    With 1 (alpha = rank) every reader gives an exported LoRA the same strength: those that know its configuration and
    those that see its keys alone.

    Args:
        state: keys `<module>.lora_A.weight` and `lora_B`.
    """
    changed: Any = copy.copy(config)  # PEFT declares alpha an int, and computes with any number
    changed.use_rslora = False
    changed.lora_alpha = _whole(factor * config.r)
    changed.alpha_pattern = {pattern: _whole(factor * rank) for pattern, rank in config.rank_pattern.items()}
    return changed, {key: _times(value, _change(config, key, factor)) for key, value in state.items()}


def _change(config: LoraConfig, key: str, factor: float) -> float:
    module, _, part = key.rpartition(".lora_")
    return scale(config, module) / factor if part.startswith("B") else 1.0


def _whole(number: float) -> float:
    """As an int where it is one, as people write it."""
    return int(number) if number == int(number) else number


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value.to(torch.float32).mul(factor).to(value.dtype)
