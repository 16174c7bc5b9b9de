"""Loading by diffusers and transformers, whose errors become one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from opd_ds.errors import UserError, shortened


def load(kind: Any, folder: Path, what: str, **options: Any) -> Any:
    """`kind.from_pretrained(folder, **options)`.

    Raises:
        UserError: it did not work, naming `what` of the folder.
    """
    try:
        return kind.from_pretrained(folder, use_safetensors=True, **options)
    except Exception as error:  # tokenizers raises plain Exception, and a damaged configuration can lead to anything
        reason = shortened(" ".join(str(error).split()), 150)
        raise UserError(f"{folder}: its {what} cannot be read ({type(error).__name__}: {reason})") from error


def diffusers_class(name: str) -> Any:
    return getattr(diffusers, name)
