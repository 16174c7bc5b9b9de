"""Mappings of mappings, as configs are."""

from __future__ import annotations

from typing import Any


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Values by their dotted keys; mappings in lists by their places."""
    if isinstance(data, list) and data and all(isinstance(one, dict) for one in data):
        data = dict(enumerate(data))
    if not isinstance(data, dict):
        return {prefix: data}
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found
