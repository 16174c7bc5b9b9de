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


def apply_umask(*files: Path) -> None:
    """Give files the mode of any new file: safetensors 0.8 writes its own for their owner alone.

    The mode is that of a new file in the same folder, as the umask can only be read by changing it for all threads.
    """
    for file in files:
        probe = file.with_name(f".{file.name}.mode")
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        file.chmod(mode)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
