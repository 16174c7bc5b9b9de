"""Files that are whole or not there: written under a hidden name, flushed, renamed."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write a text file; a crash leaves the old one or the new one."""
    draft = file.with_name(f".{file.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    publish(draft, file)


def publish(draft: Path, file: Path) -> None:
    """Flush `draft` and give it its name."""
    sync(draft)
    draft.replace(file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
