"""The embedded world: a tiny but real SD3 on real handwritten digits, three teachers, three rewards."""

from __future__ import annotations

import hashlib
from pathlib import Path

HASH_FILE = "SHA256SUMS"


def assets() -> Path:
    """Folder of the shipped base, teachers, reader and prompts."""
    return Path(__file__).parent / "assets"


def write_hashes(folder: Path) -> None:
    """Record the hash of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != HASH_FILE)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in files]
    (folder / HASH_FILE).write_text("".join(lines))


def verify(folder: Path) -> None:
    """Check every file against the recorded hashes.

    Raises:
        ValueError: naming the first file that is missing or differs.
    """
    for line in (folder / HASH_FILE).read_text().splitlines():
        digest, name = line.split("  ", 1)
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{file} is missing or differs from {HASH_FILE}; reinstall opd-ds")
