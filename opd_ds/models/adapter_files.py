"""LoRA files, in whatever form, as PEFT's configuration and keys; every key of a file is accounted for.

PEFT folders are read here. Everything else goes through `lora_state_dict` of the family's pipeline class, so a file
means here what it means to `pipeline.load_lora_weights`, foreign formats (kohya, ComfyUI, ...) included.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.models.adapter_config import exact_fields, lora_config, rank_of
from opd_ds.models.adapter_conversion import as_diffusers, not_converted, without_alphas
from opd_ds.models.adapter_keys import (
    ADAPTER_KEY,
    ALPHA,
    does_nothing_at_zero,
    is_adapter_key,
    is_factor,
    is_second_factor,
    of_text_encoder,
    other_kind,
)
from opd_ds.models.two_networks import PARTS, joined
from opd_ds.models.weight_files import read_header, stored_dtype

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"

_PEFT_PREFIX = "base_model.model."
_PREFIX = re.compile(r"^(base_model\.model\.|transformer\.)")
_METADATA = "lora_adapter_metadata"
# Blocks of FLUX by their authors' names, in which fal's trainers write PEFT's keys, with alpha = rank.
_AUTHORS_BLOCKS = ("double_blocks.", "single_blocks.")


def is_adapter(path: Path) -> bool:
    """Whether `path` is a LoRA: a PEFT folder, a diffusers LoRA folder, or a safetensors file with such keys.

    Raises:
        UserError: a file that is no safetensors file.
    """
    file = adapter_weights(path)
    if file is None:
        return bool(adapter_parts(path))
    return file != path or any(map(is_adapter_key, read_header(path)))


def adapter_weights(path: Path) -> Path | None:
    """The file of the adapter at `path`, or None; a file is not looked into."""
    if path.is_file():
        return path
    return next((path / name for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS) if (path / name).is_file()), None)


def adapter_parts(path: Path) -> dict[str, Path]:
    """The LoRAs in `path` of the two networks of one model, by the networks' folders; empty where there are none."""
    if not path.is_dir() or adapter_weights(path) is not None:
        return {}
    return {part: path / part for part in PARTS if adapter_weights(path / part) is not None}


def read_adapter(path: Path, pipeline_class: str | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter at `path`; that of two networks under the names that modules have in `TwoNetworks`.

    Args and errors: see `_read_one`, which gives the same for one network. Two LoRAs must have one rank and one alpha.
    """
    parts = adapter_parts(path)
    if not parts:
        return _read_one(path, pipeline_class)
    found = {part: _read_one(folder, pipeline_class) for part, folder in parts.items()}
    configs = [config for config, _ in found.values()]
    strengths = {part: (config.r, config.lora_alpha) for part, (config, _) in found.items()}
    if len(set(strengths.values())) > 1 or any(config.rank_pattern or config.alpha_pattern for config in configs):
        shown = ", ".join(f"{part}/ {rank} and {alpha:g}" for part, (rank, alpha) in strengths.items())
        raise UserError(f"{path}: the LoRAs of two networks must have one rank and one alpha each; they have {shown}")
    state = joined({part: weights for part, (_, weights) in found.items()})
    config = configs[0]
    config.target_modules = "|".join(re.escape(module) for module in _complete_modules(path.name, state))
    return config, state


def _read_one(path: Path, pipeline_class: str | None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration, and weights with keys `<module>.lora_A.weight` [r, in, ...] and `lora_B` [out, r, ...] relative to
    the transformer, in the file's dtype. What alphas in the file scale is in `lora_B`, in float32.

    Args:
        pipeline_class: name of the diffusers class whose conversions are used; None reads PEFT's and diffusers' keys.

    Raises:
        UserError: no adapter there, more or other than a LoRA of the transformer, or half of one.
    """
    file = adapter_weights(path)
    if file is None:
        raise UserError(f"{path}: no LoRA there; expected {PEFT_WEIGHTS} or {DIFFUSERS_WEIGHTS}")
    fields, where = recorded_fields(file)
    config = None if fields is None else lora_config(fields, where)
    raw = _without_text_encoders(file.name, _read(file))
    _refuse_other_kinds(file.name, raw)
    raw = {key: value for key, value in raw.items() if is_factor(key) or key.endswith(ALPHA)}
    if config is None:
        raw = without_alphas(file.name, raw)
    elif alphas := [key for key in raw if key.endswith(ALPHA)]:
        raise UserError(f"{file.name}: {min(alphas)!r} beside the configuration in {where}; one of them is needed")
    if pipeline_class is not None and not _is_peft(file, raw):
        raw = as_diffusers(file.name, raw, pipeline_class)
    matches = {key: ADAPTER_KEY.match(_PREFIX.sub("", key)) for key in raw}
    if strange := [key for key, match in matches.items() if match is None]:
        raise not_converted(file.name, strange, len(raw), pipeline_class)
    stored = {key: f"{match['module']}.{match['part']}.weight" for key, match in matches.items() if match}
    _refuse_several(file.name, stored)
    state = {ours: raw[key] for key, ours in stored.items()}
    modules = _complete_modules(file.name, state)
    if config is None:
        ranks = {module: state[f"{module}.lora_A.weight"].shape[0] for module in modules}
        config = lora_config(exact_fields(ranks, ranks), file.name)
    targets = config.target_modules
    if not isinstance(targets, str) and set(targets or ()) == set(modules):
        # Full names. PEFT would take each for an ending too: 'proj_out' for that of every block.
        config.target_modules = "|".join(map(re.escape, modules))
    _refuse_other_ranks(file.name, config, state, modules)
    return config, state


def named_base(path: Path) -> str | None:
    """The base that the adapter at `path` was trained on, if it is recorded; raises UserError as `read_adapter`."""
    file = adapter_weights(next(iter(adapter_parts(path).values()), path))
    fields = None if file is None else recorded_fields(file)[0]
    return (fields or {}).get("base_model_name_or_path")


def same_base(theirs: str, ours: str) -> bool:
    """Names of bases are compared by their last part: a hub id, its local copy and `package:<path>` are one base."""
    return theirs.rstrip("/").split("/")[-1].split(":")[-1] == ours.rstrip("/").split("/")[-1].split(":")[-1]


def recorded_fields(file: Path) -> tuple[dict[str, Any] | None, str]:
    """What PEFT wrote beside the weights, or diffusers into their file, and where that is; None: nothing is recorded.

    Raises:
        UserError: it cannot be read, or PEFT's weights are without it.
    """
    header = read_header(file)
    metadata = header.get("__metadata__", {})
    beside, where = file.with_name(PEFT_CONFIG), f"{file.name}: {_METADATA}"
    peft = _is_peft(file, header)
    if peft and not beside.is_file():
        raise UserError(
            f"{file.name}: these are PEFT's weights without the {PEFT_CONFIG} that says their alpha, so their "
            f"strength is not known; put {PEFT_CONFIG} of the same LoRA beside them"
        )
    try:
        if peft:
            where = PEFT_CONFIG
            fields = json.loads(beside.read_text(encoding="utf-8"))
        elif _METADATA in metadata:
            packed = json.loads(metadata[_METADATA])
            own = {key: value for key, value in packed.items() if not key.startswith("text_encoder")}
            fields = {key.removeprefix("transformer."): value for key, value in own.items()}
        else:
            return None, where
        if not isinstance(fields, dict):
            raise ValueError("no mapping")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); copy or download it again") from error
    return fields, where


def _is_peft(file: Path, keys: Any) -> bool:
    """Whether the file is what PEFT writes, whose alphas are in a file of their own."""
    peft = [key for key in keys if key.startswith(_PEFT_PREFIX)]
    theirs = any(key.removeprefix(_PEFT_PREFIX).startswith(_AUTHORS_BLOCKS) for key in peft)
    return file.name == PEFT_WEIGHTS or (bool(peft) and not theirs)


def _read(file: Path) -> dict[str, Tensor]:
    """All tensors of the file; raises UserError unless they are finite numbers of 16 bits or more."""
    for key, entry in read_header(file).items():
        if key != "__metadata__" and not key.endswith(ALPHA):
            stored_dtype(key, entry)
    with safe_open(file, framework="pt") as stored:
        raw: dict[str, Tensor] = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (no mapping)
    broken = {key: int((~torch.isfinite(value)).sum()) for key, value in raw.items() if not key.endswith(ALPHA)}
    broken = {key: count for key, count in broken.items() if count}
    if broken:
        raise UserError(
            f"{file.name}: {sum(broken.values())} values are NaN or infinite, the first in {min(broken)!r}; the "
            "training that wrote it had diverged, take an earlier checkpoint"
        )
    if not raw:
        raise UserError(f"{file.name}: holds no tensors; copy or download it again")
    return raw


def _refuse_other_kinds(name: str, raw: dict[str, Tensor]) -> None:
    """Whatever is neither a factor of a LoRA nor an alpha must be known to do nothing."""
    for key in sorted(raw):
        kind = other_kind(key)
        if kind and not (does_nothing_at_zero(key) and not raw[key].any()):
            raise UserError(f"{name}: holds {kind} ({key!r}); allowed are plain LoRAs, merge it elsewhere")
    strange = [key for key in raw if not is_factor(key) and not key.endswith(ALPHA) and not other_kind(key)]
    if strange:
        raise UserError(
            f"{name}: {len(strange)} of {len(raw)} keys are not LoRA weights of a transformer, the first: "
            f"{min(strange)!r}; biases and whole weights beside a LoRA are not supported, merge it elsewhere"
        )
    if not raw:
        raise UserError(f"{name}: 0 keys are left for the transformer; it is a LoRA of text encoders alone")


def _without_text_encoders(name: str, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the parts for text encoders, which must do nothing: prompts are encoded once, by the base's encoders."""
    keys = sorted(key for key in raw if of_text_encoder(key))
    if any(bool(raw[key].any()) for key in keys if is_second_factor(key) or not (is_factor(key) or ALPHA in key)):
        raise UserError(
            f"{name}: adapts a text encoder too ({len(keys)} keys, the first: {keys[0]!r}), while prompts are "
            "encoded by the base's; a LoRA without these keys can be read"
        )
    return {key: value for key, value in raw.items() if not of_text_encoder(key)}


def _refuse_several(name: str, stored: dict[str, str]) -> None:
    """Two keys of one meaning are two adapters that were saved together; of these one would be read.

    Args:
        stored: by the keys in the file, what they are here.
    """
    first: dict[str, str] = {}
    for key in sorted(stored):
        other = first.setdefault(stored[key], key)
        if other != key:
            raise UserError(
                f"{name}: holds several LoRAs of one module ({other!r} and {key!r}); save one of them, or merge them "
                "with `opd-ds merge`"
            )


def _complete_modules(name: str, state: dict[str, Tensor]) -> list[str]:
    """The adapted modules, sorted; raises UserError where one has only half of its LoRA."""
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    halves = [module for module in modules if not all(f"{module}.lora_{part}.weight" in state for part in "AB")]
    if halves:
        lacking = next(part for part in "AB" if f"{halves[0]}.lora_{part}.weight" not in state)
        raise UserError(
            f"{name}: {len(halves)} modules have half a LoRA, the first: {halves[0]!r} has no lora_{lacking}"
        )
    return modules


def _refuse_other_ranks(name: str, config: LoraConfig, state: dict[str, Tensor], modules: list[str]) -> None:
    for module in modules:
        a, b = (state[f"{module}.lora_{part}.weight"] for part in "AB")
        rank = rank_of(config, module)
        if min(a.ndim, b.ndim) < 2 or not a.shape[0] == b.shape[1] == rank:
            raise UserError(
                f"{name}: {module!r} has {tuple(a.shape)} and {tuple(b.shape)} for lora_A and lora_B, its config says "
                f"rank {rank}"
            )
