"""Hashes that name what a run has read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_LARGEST_HEADER = 1 << 27  # bytes; safetensors allows 100 MB


def file_sha256(path: Path) -> str:
    """Hash of a file, or of all weight and config files of a folder in name order."""
    return _sha256(path, by_meaning=False)


def weights_sha256(path: Path) -> str:
    """The same, but equal weights have equal hashes: safetensors writes the entries of its header in any order."""
    return _sha256(path, by_meaning=True)


def all_weights_sha256(paths: Iterable[Path]) -> dict[Path, str]:
    """`weights_sha256` of each, several at a time: a core reads about a gigabyte a second."""
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(min(8, len(distinct) or 1)) as pool:
        return dict(zip(distinct, pool.map(weights_sha256, distinct), strict=True))


def _sha256(path: Path, *, by_meaning: bool) -> str:
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".json"))
    for file in files:
        digest.update(str(file.relative_to(path)).encode() if file != path else b"")
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
