"""Networks in safetensors files: what their headers say.

A header is a few kilobytes at the start of a file. All that can be wrong with names and shapes is found there, before
gigabytes are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from opd_ds.errors import UserError

NETWORK_WEIGHTS = "diffusion_pytorch_model.safetensors"
Shapes = dict[str, tuple[int, ...]]

_LARGEST_HEADER = 100 * 2**20  # bytes, what safetensors allows
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_header(file: Path) -> dict[str, Any]:
    """Names, types and shapes in a safetensors file; `__metadata__` as well where there is any.

    Raises:
        UserError: it is none, or cut off.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LARGEST_HEADER:
                raise ValueError("no header")
            header: dict[str, Any] = json.loads(stream.read(length))
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        if file.stat().st_size < 8 + length + end:
            raise ValueError("cut off")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged or no safetensors file ({error}); copy or download it again") from error
    return header


def stored_dtype(name: str, entry: Mapping[str, Any]) -> torch.dtype:
    """Of the weight `name` by its header's `entry`; UserError for quantized ones."""
    if entry["dtype"] not in _DTYPES:
        raise UserError(f"{name!r} is stored as {entry['dtype']}; allowed are {', '.join(_DTYPES)}")
    return _DTYPES[entry["dtype"]]


def read_shapes(files: Iterable[Path]) -> Shapes:
    """The shapes of all tensors in `files`, by name; raises as `read_header`."""
    return {
        key: tuple(entry["shape"])
        for file in files
        for key, entry in read_header(file).items()
        if key != "__metadata__"
    }


def network_files(path: Path) -> list[Path]:
    """The files with the network's weights of a checkpoint folder: of `path/transformer` where there is one.

    Raises:
        UserError: there are none, or not all that the index lists.
    """
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    index = folder / f"{NETWORK_WEIGHTS}.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {NETWORK_WEIGHTS}
    if lacking := sorted(name for name in names if not (folder / name).is_file()):
        raise UserError(f"{path}: no {(folder / lacking[0]).relative_to(path)}")
    return [folder / name for name in sorted(names)]


def refuse_other_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless both name the same weights with the same shapes; it shows the first differences."""
    differences = []
    for kind, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            differences.append(f"{len(names)} {kind}, the first: {min(names)!r}")
    wrong = sorted(key for key in wanted.keys() & found.keys() if wanted[key] != found[key])
    if wrong:
        shapes = f"{found[wrong[0]]} instead of {wanted[wrong[0]]}"
        differences.append(f"{len(wrong)} of another shape, the first: {wrong[0]!r} is {shapes}")
    if differences:
        raise UserError(f"its weights are not those of the base: {'; '.join(differences)}")
