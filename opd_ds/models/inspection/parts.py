"""The parts of a diffusers folder: which files of each its loader takes, and whether they are all there."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ds.errors import UserError
from opd_ds.models.weight_files import other_format, read_header, stored_dtype

CONFIG = "config.json"
NETWORK_WEIGHTS = "diffusion_pytorch_model.safetensors"  # as diffusers names them
ENCODER_WEIGHTS = "model.safetensors"  # as transformers does
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx")
_QUANTIZATIONS = ("quantization_config", "compression_config")
# Buffers of text encoders and VAEs: positions, masks, counts of batches.
_INTEGERS = ("I64", "I32", "BOOL")


@dataclass(frozen=True)
class Part:
    """One folder of a pipeline, or one folder by itself.

    Attributes:
        name: of the folder, for people.
        kind: its class, and how its weights are stored.
        files: what is loaded.
        ignored: other weights in the folder.
        problem: why it cannot be loaded.
    """

    name: str
    kind: str
    files: tuple[Path, ...] = ()
    ignored: tuple[str, ...] = ()
    problem: str | None = None


def look_at_network(folder: Path, name: str, library: str | None = None) -> Part:
    """A folder with a network's configuration and weights.

    Args:
        library: `transformers` or `diffusers` where it loads the network, integer buffers included; None: a
            transformer, which is read here.
    """
    weights = ENCODER_WEIGHTS if library == "transformers" else NETWORK_WEIGHTS
    try:
        config = read_config(folder)
        kind = str(config.get("_class_name") or next(iter(config.get("architectures") or ()), "network"))
        files = weight_files(folder, weights)
        stored = _stored_as(files, integers=library is not None)
    except UserError as error:
        return Part(name, "network", problem=str(error))
    others = sorted(set(folder.iterdir()) - set(files))
    ignored = tuple(file.name for file in others if file.suffix in WEIGHT_SUFFIXES)
    return Part(name, f"{kind}, {stored}", (folder / CONFIG, *files), ignored)


def look_at_other(folder: Path, name: str) -> Part:
    """A tokenizer, a scheduler, an image processor: small files, all of which may be read."""
    files = tuple(sorted(file for file in folder.rglob("*") if file.is_file())) if folder.is_dir() else ()
    problem = None if files else f"{folder} is missing or empty; copy or download it"
    for file in files:
        # Some tokenizers come with empty lists of merges.
        if problem is None and (file.suffix == ".json" or file.stat().st_size) and (instead := other_format(file)):
            problem = f"{file} is {instead}"
    return Part(name, "settings", files, problem=problem)


def read_config(folder: Path, file: str = CONFIG) -> dict[str, Any]:
    """The configuration in `folder`.

    Raises:
        UserError: there is none, it is no JSON object, or it says that the weights are quantized.
    """
    path = folder / file
    if not path.is_file():
        raise UserError(f"no {path}; copy or download it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        instead = other_format(path) or f"no valid JSON ({error}); copy or download it again"
        raise UserError(f"{path} is {instead}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is no JSON object; copy or download it again")
    for key in _QUANTIZATIONS:
        if config.get(key):
            raise UserError(f"{path}: {key}: the weights are {_quantized(config[key])}; give the unquantized model")
    return config


def _quantized(settings: Any) -> str:
    if not isinstance(settings, dict):
        return f"quantized ({settings!r})"
    chosen = [key for key, value in settings.items() if value is True and key.startswith("load_in_")]
    method = (
        settings.get("quant_method") or settings.get("format") or ("bitsandbytes" if chosen else "an unnamed method")
    )
    return f"quantized by {method}" + (f" ({', '.join(chosen)})" if chosen else "")


def weight_files(folder: Path, weights: str = NETWORK_WEIGHTS) -> list[Path]:
    """The safetensors files of a network, one or its shards, as `weights` names them: those that its loader takes.

    Raises:
        UserError: there are none, not all, or not with the tensors that the index lists.
    """
    index, single = folder / f"{weights}.index.json", folder / weights
    whole_first = weights == ENCODER_WEIGHTS  # transformers prefers it, diffusers the index
    if single.is_file() and (whole_first or not index.is_file()):
        return [single]
    if not index.is_file():
        raise UserError(_instead_of(folder, weights))
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        instead = other_format(index) or f"no index of weights ({type(error).__name__}); copy or download it again"
        raise UserError(f"{index} is {instead}") from error
    if any("/" in name or name.startswith(".") for name in names):
        raise UserError(f"{index} names files outside its folder; copy or download it again")
    if lacking := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} lacks {len(lacking)} of {len(names)} files that {index.name} lists, the first: {lacking[0]}; "
            "copy or download it"
        )
    stored = Counter(key for name in names for key in read_header(folder / name) if key != "__metadata__")
    if absent := sorted(places.keys() - stored.keys()):
        raise UserError(f"{index} lists {len(absent)} tensors that its files lack, the first: {absent[0]!r}")
    if doubled := sorted(key for key, count in stored.items() if count > 1):
        raise UserError(f"{folder}: {len(doubled)} tensors are in several files, the first: {doubled[0]!r}")
    return [folder / name for name in names]


def _instead_of(folder: Path, weights: str) -> str:
    """Why there are no weights: what is there instead."""
    stem = weights.removesuffix(".safetensors")
    found = sorted(file.name for file in folder.glob("*") if {*file.suffixes} & {*WEIGHT_SUFFIXES})
    shard = r"(-\d+-of-\d+)?"
    variant = re.compile(rf"{stem}{shard}\.(?!safetensors)([^.-]+){shard}\.safetensors")
    variants = [match[2] for match in map(variant.fullmatch, found) if match]
    said = f"no {folder / weights}"
    if variants:
        return f"{said}, only the variant {variants[0]!r}; variants are not read: download or save the default weights"
    if pickles := [name for name in found if ".bin" in name or name.endswith((".pt", ".pth", ".ckpt"))]:
        return f"{said}, only a pickle ({pickles[0]}); only safetensors files are read, convert it"
    if others := [name for name in found if not name.endswith(".json")]:
        return f"{said}, but {others[0]}; copy or download the safetensors files under their usual names"
    return f"{said}; copy or download it"


def _stored_as(files: list[Path], *, integers: bool) -> str:
    """Types of the tensors, and in how many files they are."""
    types: Counter[str] = Counter()
    for file in files:
        for key, entry in _tensors(file):
            if not (integers and entry["dtype"] in _INTEGERS):
                stored_dtype(f"{file.parent.name}: {key}", entry)
            types[entry["dtype"]] += 1
    if not types:
        raise UserError(f"{files[0]} holds no tensors; copy or download it again")
    return f"{' and '.join(sorted(types))}" + (f", {len(files)} files" if len(files) > 1 else "")


def _tensors(file: Path) -> Iterator[tuple[str, Any]]:
    return ((key, entry) for key, entry in read_header(file).items() if key != "__metadata__")
