"""Folders that are written to later: is that possible?"""

from __future__ import annotations

import tempfile
from pathlib import Path

from opd_ds.errors import UserError


def existing_part(folder: Path) -> Path:
    """`folder`, or the nearest part of its path that is there; the rest would be made.

    Raises:
        OSError: a part cannot be looked at.
    """
    folder = folder.expanduser().absolute()
    return next(part for part in (folder, *folder.parents) if part.exists())


def refuse_unwritable(folder: Path, key: str) -> None:
    """Raise UserError, naming the config's `key`, unless files can be written in `folder`, which need not be there.
    Nothing stays behind.
    """
    try:
        with tempfile.TemporaryFile(dir=existing_part(folder)):
            pass
    except OSError as error:
        raise UserError(f"{key} = {str(folder)!r}: cannot be written: {error.strerror}; give another folder") from error
