"""Hashes that name what a run has read."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_sha256(path: Path, suffixes: tuple[str, ...] = (".safetensors", ".json")) -> str:
    """Hash of a file, or of all weight and config files of a folder in name order."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in suffixes)
    for file in files:
        digest.update(str(file.relative_to(path)).encode() if file != path else b"")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
