"""Mappings of mappings, as configs are."""

from __future__ import annotations

from typing import Any


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Values of `above` replace those of `below`; mappings are merged."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


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
