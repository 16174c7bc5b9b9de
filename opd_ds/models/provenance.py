"""Which keys of a file went into a tensor: for converters, which drop what they do not know."""

from __future__ import annotations

from typing import Any


def sources_of(values: Any) -> frozenset[str]:
    """The keys behind tensors that carry them as `sources`, of one, or of all in a list or tuple."""
    if isinstance(values, (tuple, list)):
        return frozenset().union(*map(sources_of, values))
    return getattr(values, "sources", frozenset())
