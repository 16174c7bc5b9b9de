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
from safetensors import SafetensorError, safe_open

from opd_ds.errors import UserError
from opd_ds.utils.stand_ins import STAND_INS

Shapes = dict[str, tuple[int, ...]]

_LARGEST_HEADER = 100 * 2**20  # bytes, what safetensors allows
_PICKLE = "a pickle of torch; only safetensors files are read, convert it"
_OTHER_FORMATS = {  # by their first bytes, in lower case
    **STAND_INS,
    b"gguf": "a GGUF file, and GGUF is not read; take the safetensors files of the same model in 16 bits",
    b"pk\x03\x04": _PICKLE,
    b"\x80\x02": _PICKLE,
    b"\x89hdf": "an HDF5 file; only safetensors files are read, convert it",
}
# Of a file with a whole model, by its authors' names: what is not its transformer.
NOT_TRANSFORMER = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.", "model_ema.")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_header(file: Path) -> dict[str, Any]:
    """Names, types and shapes in a safetensors file; `__metadata__` as well where there is any.

    Raises:
        UserError: it is another kind of file, damaged, or cut off.
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
        safe_open(file, framework="pt")  # its own rules of what is whole
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        if instead := other_format(file):
            raise UserError(f"{file} is {instead}") from error
        raise UserError(f"{file} is damaged or no safetensors file ({error}); copy or download it again") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error})") from error
    return header


def other_format(file: Path) -> str | None:
    """What a file is that people have in place of a safetensors or JSON file, with what to do; None: not known."""
    with file.open("rb") as stream:
        start = stream.read(512)
    if not start:
        return "empty; copy or download it again"
    for begin, what in _OTHER_FORMATS.items():
        if start.lstrip().lower().startswith(begin):
            return what
    return None


def stored_dtype(name: str, entry: Mapping[str, Any]) -> torch.dtype:
    """Of the weight `name` by its header's `entry`; UserError for quantized ones."""
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{name!r} is stored as {entry['dtype']}; allowed are {', '.join(DTYPES)}")
    return DTYPES[entry["dtype"]]


def read_shapes(files: Iterable[Path]) -> Shapes:
    """The shapes of all tensors in `files`, by name; raises as `read_header`."""
    return {
        key: tuple(entry["shape"])
        for file in files
        for key, entry in read_header(file).items()
        if key != "__metadata__"
    }


def refuse_other_shapes(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], owner: str
) -> None:
    """Raise UserError unless both name the same weights with the same shapes; it shows the first differences.

    Args:
        owner: whose the wanted ones are.
    """
    differences = []
    for kind, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            differences.append(f"{len(names)} {kind}, the first: {min(names)!r}")
    wrong = sorted(key for key in wanted.keys() & found.keys() if wanted[key] != found[key])
    if wrong:
        example = f", the first: {wrong[0]!r} is {found[wrong[0]]} instead of {wanted[wrong[0]]}"
        # Three examples are longer than a message may be.
        differences.append(f"{len(wrong)} of another shape{example if len(differences) < 2 else ''}")
    if differences:
        raise UserError(f"its weights are not those of {owner}: {'; '.join(differences)}")
