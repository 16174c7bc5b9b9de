"""Files with one JSON object a line."""

from __future__ import annotations

import json
import math
from typing import Any


def json_line(row: dict[str, Any]) -> str:
    """One line; a number that is not finite, for which JSON has no word, is null."""
    return json.dumps({key: _plain(value) for key, value in row.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
