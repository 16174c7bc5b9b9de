"""Hashes that name what a run has read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_LARGEST_HEADER = 1 << 27  # bytes; safetensors allows 100 MB
# Weights, configurations, tokenizers: all that networks and tokenizers are loaded from. Cards and pictures are not.
_READ = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")
_BESIDE_WEIGHTS = "adapter_config.json"  # PEFT keeps the alpha of a LoRA in a file of its own


def file_sha256(path: Path) -> str:
    """Hash of a file, or of all files of a folder that a model is loaded from, in name order; links are followed. With
    a safetensors file goes PEFT's configuration beside it.
    """
    return _sha256(path, by_meaning=False)


def weights_sha256(path: Path) -> str:
    """The same, but equal weights have equal hashes: safetensors writes the entries of its header in any order."""
    return _sha256(path, by_meaning=True)


def all_weights_sha256(paths: Iterable[Path]) -> dict[Path, str]:
    """`weights_sha256` of each, several at a time: a core reads about a gigabyte a second."""
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(min(8, len(distinct) or 1)) as pool:
        return dict(zip(distinct, pool.map(weights_sha256, distinct), strict=True))


def files_below(path: Path) -> list[Path]:
    """The file at `path`, or all in the folder, in order of their names. Links to folders are followed, each folder is
    visited once, hidden ones are not.
    """
    if path.is_file():
        return [path]
    found, visited = [], set()
    for folder, below, names in os.walk(path, followlinks=True):
        visited.add(os.path.realpath(folder))
        below[:] = [name for name in below if name[0] != "." and os.path.realpath(Path(folder, name)) not in visited]
        found += [Path(folder, name) for name in names if Path(folder, name).is_file()]
    return sorted(found)


def _read_files(path: Path) -> list[Path]:
    if path.is_dir():
        return [file for file in files_below(path) if file.suffix in _READ]
    beside = path.with_name(_BESIDE_WEIGHTS)
    return [path, beside] if path.suffix == ".safetensors" and beside.is_file() else [path]


def _sha256(path: Path, *, by_meaning: bool) -> str:
    digest = hashlib.sha256()
    for file in _read_files(path):
        digest.update(str(file.relative_to(path)).encode() if path.is_dir() else b"")
        with file.open("rb") as stream:
            if by_meaning and file.suffix == ".safetensors":
                start = stream.read(8)
                header = stream.read(min(int.from_bytes(start, "little"), _LARGEST_HEADER))
                digest.update(start + _sorted_entries(header))
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _sorted_entries(header: bytes) -> bytes:
    try:
        return json.dumps(json.loads(header), sort_keys=True).encode()
    except ValueError:  # not a safetensors file; whoever loads it will say so
        return header
