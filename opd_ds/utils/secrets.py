"""What must not leave the machine in a log."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_SECRET_KEY = re.compile(r"(^|_)(api_?key|key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)|(?<=[?&]write_token=)[^&\s]+")


def without_secrets(value: Any) -> Any:
    """A copy of nested mappings and lists in which values of keys such as `api_key`, and users and passwords in URLs,
    are hidden.
    """
    if isinstance(value, dict):
        return {key: HIDDEN if _holds_secret(key, found) else without_secrets(found) for key, found in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(found) for found in value]
    return _IN_URL.sub(HIDDEN, value) if isinstance(value, str) else value


def _holds_secret(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and _SECRET_KEY.search(key) is not None
