"""What goes wrong with files and settings on their way: hypothesis strategies that spoil good ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

# Values that stand where another one should: wrong types, and numbers and texts at the edges of what is possible.
_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-320, 1e308, 2**31, 2**63, -(2**64), 10**30,
    float("nan"), float("inf"), float("-inf"),
    "", " ", "a", "auto", "none", "null", "true", "1", "1e-4", "nan", "01:30", "2026-01-01", "3 GB", "~", "~nobody/x",
    ".", "..", "/", "/dev/null", "/dev/zero", "a/b", "org/name/sub", "x" * 300, "[1]", "*", "?", "%s", "{}", "$HOME",
    "a\0b", "\ud83d", "\u2028", "größe 漢字", "\x1b[31m", "-1", "package:", "package:recipes", "zero2", "fp16",
    [], [None], [[]], ["a"], [1, 2, 3], {}, {"": None}, {"a": {"b": [1]}}, {"path": None},
]  # fmt: skip


_CHANGES = st.sampled_from([1, 1, 1, 2, 3])


def odd_values() -> SearchStrategy[Any]:
    return st.one_of(
        st.sampled_from(_ODD), st.text(max_size=12), st.integers(), st.floats(), st.lists(st.integers(), max_size=3)
    )


@st.composite
def spoiled(draw: DrawFn, data: Any, odd: SearchStrategy[Any] | None = None) -> Any:
    """`data`, nested mappings and lists, with one to three changes at random places. Half of them keep types."""
    data = copy.deepcopy(data)
    values = odd_values() if odd is None else odd
    for _ in range(draw(_CHANGES)):
        places = _places(data)
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        _spoil(draw, holder, key, values)
    return data


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every value inside as its container and its key there."""
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else []
    found: list[tuple[Any, Any]] = []
    for key in keys:
        found += [(data, key), *_places(data[key])]
    return found


def _spoil(draw: DrawFn, holder: Any, key: Any, values: SearchStrategy[Any]) -> None:
    how = draw(st.sampled_from(["near"] * 6 + ["replace", "remove", "misspell", "wrap", "text", "add"]))
    value = holder[key]
    if how == "near":
        holder[key] = draw(near(value))
    elif how == "replace":
        holder[key] = draw(values)
    elif how == "remove":
        del holder[key]
    elif how == "wrap":
        holder[key] = draw(st.sampled_from([[value], {"value": value}, [value, value]]))
    elif how == "text":
        holder[key] = str(value)
    elif isinstance(holder, dict):
        holder[draw(near(str(key)))] = holder.pop(key) if how == "misspell" else draw(values)
    else:
        holder.append(draw(values))


def near(value: Any) -> SearchStrategy[Any]:
    """Other values of the same type."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int | float):
        return st.sampled_from([0, 1, -value, value + 1, value * 1000, value / 3, type(value)(value // 2)])
    if isinstance(value, str):
        others = st.integers(0, max(0, len(value) - 1)).map(lambda at: value[:at] + value[at + 1 :])
        return others | st.sampled_from([value.upper(), value.replace("_", "-"), f"{value}x", f" {value}", f"{value}/"])
    if isinstance(value, list):
        return st.permutations(value) | st.just(value + value) | st.just(value[1:])
    return st.just({}) if isinstance(value, dict) else odd_values()


@st.composite
def damaged(draw: DrawFn, content: bytes) -> bytes:
    """`content` cut off, with some bytes flipped, zeroed, taken out or put in, or in another encoding."""
    for _ in range(draw(_CHANGES)):
        how = draw(st.sampled_from(["cut", "flip", "zero", "take", "put", "double", "encode", "empty"]))
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(1, 8))
        if how == "cut":
            content = content[:at]
        elif how == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        elif how == "zero":
            content = content[:at] + bytes(length) + content[at + length :]
        elif how == "take":
            content = content[:at] + content[at + length :]
        elif how == "put":
            content = content[:at] + draw(st.sampled_from(_INSERTED)) + content[at:]
        elif how == "double":
            content = content[:at] + content
        elif how == "encode":
            text = content.decode("utf-8", errors="replace")
            content = text.encode(draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-32", "latin-1"])), errors="replace")
        elif how == "empty":
            content = b""
    return content


_INSERTED: Sequence[bytes] = [
    b"\0", b"\n", b"\r", b"\t", b'"', b"{", b"}", b"[", b":", b"- ", b"#", b",", b"\xff\xfe", b"\xef\xbb\xbf",
    b"\xe2\x80\xa8", b"NaN", b"!!python/object:os.system", b"&a ", b"*a ", b"<<: ", b"\\ud83d", b"9" * 5000,
    b"[" * 3000, b"{" * 3000,
]  # fmt: skip
