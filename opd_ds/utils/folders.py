"""Folders that are written to later: is that possible?"""

from __future__ import annotations

import tempfile
from pathlib import Path


def existing_part(folder: Path) -> Path:
    """`folder`, or the nearest part of its path that is there; the rest would be made.

    Raises:
        OSError: a part cannot be looked at.
    """
    folder = folder.expanduser().absolute()
    return next(part for part in (folder, *folder.parents) if part.exists())


def try_to_write(folder: Path) -> None:
    """Raise OSError unless files can be written in `folder`, which need not be there. Nothing stays behind."""
    with tempfile.TemporaryFile(dir=existing_part(folder)):
        pass
