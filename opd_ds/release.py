"""What a folder of weights needs before it leaves: a place of its own, and a card that says what it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from opd_ds.errors import UserError

CARD = "README.md"


def refuse_occupied(folder: Path) -> None:
    """Raise UserError unless `folder` is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; give another one")


def base_name(base: str) -> str:
    """The last part of a hub id, a path or `package:<path>`."""
    return base.rstrip("/").split("/")[-1]


def model_card(
    title: str,
    summary: str,
    *,
    base: str | None,
    sources: Iterable[tuple[str, str, str]],
    settings: Mapping[str, Any],
) -> str:
    """The text of a model card.

    Args:
        base: the model it belongs to, None when nobody recorded it.
        sources: (role, path or hub id, SHA-256) of all it was made from.
        settings: what decided the numbers, shown as YAML.
    """
    lines = [
        "---",
        "library_name: diffusers",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "---",
        "",
        f"# {title}",
        "",
        summary,
        "",
        "| | | SHA-256 |",
        "|---|---|---|",
        *(f"| {role} | `{path}` | `{sha256}` |" for role, path, sha256 in sources),
        "",
        "## Settings",
        "",
        "```yaml",
        yaml.safe_dump(dict(settings), sort_keys=False).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"
