"""Errors of a disk, however they are raised."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError


def disk_error(error: BaseException, file: Path | None = None) -> OSError | None:
    """What the disk said, or None where it was something else.

    Args:
        file: that was written, where the error does not name it. safetensors (0.8) and `shutil.copytree` wrap the error
            of the disk in one of their own, with the number in the text only.
    """
    if not isinstance(error, SafetensorError | shutil.Error):
        return error if isinstance(error, OSError) else None
    number = re.search(r"(?:os error |Errno )(\d+)", str(error))
    if number is None:
        return None
    return OSError(int(number[1]), os.strerror(int(number[1])), *([str(file)] if file else []))
