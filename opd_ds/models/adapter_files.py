"""LoRA files, in whatever form, as PEFT's configuration and keys; every key of a file is accounted for.

PEFT folders are read here. Everything else goes through `lora_state_dict` of the family's pipeline class, so a file
means here what it means to `pipeline.load_lora_weights`, foreign formats (kohya, ComfyUI, ...) included.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.models import privates
from opd_ds.models.weight_files import read_header

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# What `LoraConfig` is made again from; the rest of its fields decides about training, or is refused by its keys.
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
ADAPTER_KEY = re.compile(r"^(?P<module>.+)\.(?P<part>lora_[AB])\.(?:(?P<adapter>[^.]+)\.)?weight$")

_PREFIX = re.compile(r"^(base_model\.model\.|transformer\.)")
_ANY_ADAPTER = re.compile(r"lora|lokr_|hada_")
_NOT_LORA = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}
_TEXT_ENCODER = re.compile(r"^(base_model\.model\.)?(text_encoder|lora_te|te\d?[._]|conditioner|cond_stage)")
_SECOND_FACTOR = re.compile(r"lora_B|lora_up|\.up\.")


def is_adapter(path: Path) -> bool:
    """Whether `path` is a LoRA: a PEFT folder, a diffusers LoRA folder, or a safetensors file with such keys.

    Raises:
        UserError: a file that is no safetensors file.
    """
    file = adapter_weights(path)
    return file is not None and (file != path or any(map(_ANY_ADAPTER.search, read_header(path))))


def adapter_weights(path: Path) -> Path | None:
    """The file of the adapter at `path`, or None; a file is not looked into."""
    if path.is_file():
        return path
    return next((path / name for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS) if (path / name).is_file()), None)


def read_adapter(path: Path, pipeline_class: str | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration, and weights with keys `<module>.lora_A.weight` [r, in, ...] and `lora_B` [out, r, ...] relative to
    the transformer, in the file's dtype.

    Args:
        pipeline_class: name of the diffusers class whose conversions are used; None reads PEFT's and diffusers' keys.

    Raises:
        UserError: no adapter there, more or other than a LoRA of the transformer, or half of one.
    """
    file = adapter_weights(path)
    if file is None:
        raise UserError(f"{path}: no LoRA there; expected {PEFT_WEIGHTS} or {DIFFUSERS_WEIGHTS}")
    read_header(file)
    with safe_open(file, framework="pt") as stored:
        raw: dict[str, Tensor] = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (no mapping)
        metadata = stored.metadata() or {}
    _refuse_other_kinds(file.name, raw)
    raw = _without_text_encoders(file.name, raw)
    fields = _recorded_fields(file, metadata)
    if pipeline_class is not None and not (file.parent / PEFT_CONFIG).is_file():
        raw = _as_diffusers(file.name, raw, pipeline_class)
    state, alphas, strange = {}, {}, []
    for key, value in raw.items():
        match = ADAPTER_KEY.match(_PREFIX.sub("", key))
        if match:
            state[f"{match['module']}.{match['part']}.weight"] = value
        elif key.endswith(".alpha") and value.numel() == 1 and fields is None:
            alphas[_PREFIX.sub("", key).removesuffix(".alpha")] = float(value)
        else:
            strange.append(key)
    if strange or not state:
        known = f" that diffusers converts for {pipeline_class}" if pipeline_class else ""
        raise UserError(
            f"{file.name}: {len(strange)} of {len(raw)} keys are not LoRA weights of a transformer{known}, the first: "
            f"{min(strange, default='-')!r}; it is for another model or in another form"
        )
    modules = _complete_modules(file.name, state)
    ranks = {module: state[f"{module}.lora_A.weight"].shape[0] for module in modules}
    config = _config(
        fields or exact_fields(ranks, {module: alphas.get(module, rank) for module, rank in ranks.items()})
    )
    targets = config.target_modules
    if not isinstance(targets, str) and set(targets or ()) == set(modules):
        # Full names. PEFT would take each for an ending too: 'proj_out' for that of every block.
        config.target_modules = "|".join(map(re.escape, modules))
    _refuse_other_ranks(file.name, config, state, modules)
    return config, state


def named_base(path: Path) -> str | None:
    """The base that the adapter at `path` was trained on, if it is recorded; raises UserError as `read_adapter`."""
    file = adapter_weights(path)
    if file is None:
        return None
    metadata = read_header(file).get("__metadata__", {})
    return (_recorded_fields(file, metadata) or {}).get("base_model_name_or_path")


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


def scale(config: LoraConfig, module: str) -> float:
    """The factor on B A."""
    rank = config.rank_pattern.get(privates.pattern_key()(list(config.rank_pattern), module), config.r)
    alpha = config.alpha_pattern.get(privates.pattern_key()(list(config.alpha_pattern), module), config.lora_alpha)
    return float(alpha / (rank**0.5 if config.use_rslora else rank))


def same_base(theirs: str, ours: str) -> bool:
    """Names of bases are compared by their last part: a hub id, its local copy and `package:<path>` are one base."""
    return theirs.rstrip("/").split("/")[-1].split(":")[-1] == ours.rstrip("/").split("/")[-1].split(":")[-1]


def _recorded_fields(file: Path, metadata: dict[str, str]) -> dict[str, Any] | None:
    """What PEFT or diffusers wrote beside the weights, or into their file; None where nothing is recorded."""
    beside = file.parent / PEFT_CONFIG
    try:
        if beside.is_file():
            fields: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
        elif "lora_adapter_metadata" in metadata:
            packed = json.loads(metadata["lora_adapter_metadata"])
            fields = {key.removeprefix("transformer."): value for key, value in packed.items()}
        else:
            return None
    except (ValueError, AttributeError) as error:
        where = PEFT_CONFIG if beside.is_file() else f"{file.name}: lora_adapter_metadata"
        raise UserError(f"{where} is not valid JSON ({error}); copy or download it again") from error
    kind = fields.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{PEFT_CONFIG}: peft_type = {kind!r}; allowed is 'LORA'")
    return fields


def _config(fields: dict[str, Any]) -> LoraConfig:
    config = LoraConfig(**{key: fields[key] for key in FIELDS if fields.get(key) is not None})
    config.base_model_name_or_path = fields.get("base_model_name_or_path")
    return config


def _refuse_other_kinds(name: str, raw: dict[str, Tensor]) -> None:
    for mark, kind in _NOT_LORA.items():
        if keys := [key for key in raw if mark in key]:
            raise UserError(
                f"{name}: holds {kind} weights ({min(keys)!r}); allowed are plain LoRAs, merge it elsewhere"
            )


def _without_text_encoders(name: str, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the parts for text encoders, which must do nothing: prompts are encoded once, by the base's encoders."""
    keys = sorted(key for key in raw if _TEXT_ENCODER.match(key))
    if any(bool(raw[key].any()) for key in keys if _SECOND_FACTOR.search(key)):
        raise UserError(
            f"{name}: adapts a text encoder too ({len(keys)} keys, the first: {keys[0]!r}), while prompts are "
            "encoded by the base's; a LoRA without these keys can be read"
        )
    return {key: value for key, value in raw.items() if not _TEXT_ENCODER.match(key)}


def _as_diffusers(name: str, raw: dict[str, Tensor], pipeline_class: str) -> dict[str, Tensor]:
    """What `pipeline.load_lora_weights` makes of a file, alphas among the weights as `<module>.alpha`."""
    import diffusers
    import torch

    convert = privates.unet_state_dict_to_peft()
    try:
        found = getattr(diffusers, pipeline_class).lora_state_dict(dict(raw), return_alphas=True)
        state, alphas = found if isinstance(found, tuple) else (found, None)
        if not all(map(ADAPTER_KEY.match, state)):
            state = convert(state)
    except Exception as error:  # the converters assume their format and fail in as many ways as a file can differ
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{name}: diffusers cannot convert it for {pipeline_class} ({type(error).__name__}: "
            f"{reason[0].rstrip(': ') if reason else '-'}), its first key: {min(raw, default='-')!r}; it is for "
            "another model or in another form"
        ) from error
    return state | {key: torch.as_tensor(alpha) for key, alpha in (alphas or {}).items()}


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
        rank = config.rank_pattern.get(privates.pattern_key()(list(config.rank_pattern), module), config.r)
        if not a.shape[0] == b.shape[1] == rank:
            raise UserError(
                f"{name}: {module!r} has {tuple(a.shape)} and {tuple(b.shape)} for lora_A and lora_B, its config says "
                f"rank {rank}"
            )
