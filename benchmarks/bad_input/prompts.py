"""Prompt files, given to `opd-ds data check` and to the reader of a run, which must agree."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from benchmarks.bad_input.mutations import damaged, odd_values, spoiled
from benchmarks.bad_input.trial import Kind, RefusedError, command
from opd_ds.config.sections import PromptsSection
from opd_ds.data import PromptSet
from opd_ds.errors import UserError

_ROWS: list[dict[str, Any]] = [
    {"prompt": 'A 27" monitor that shows "HELLO"', "tag": "text", "level": 1},
    {"prompt": "two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]},
    {"prompt": "a dog left of a car", "tag": "position", "include": [
        {"class": "car", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]},
    {"prompt": "größe 漢字 \N{GRINNING FACE}", "tag": None, "text": "x"},
]  # fmt: skip
_FORMATS = ("txt", "jsonl", "csv", "parquet")


def _as_bytes(rows: list[Any], form: str) -> bytes:
    """Rows in a format, which may be unable to hold them: then as texts."""
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    whole = [row for row in rows if isinstance(row, dict)]
    if form == "txt":
        return "".join(f"{row.get('prompt')}\n" for row in whole).encode(errors="replace")
    if form == "csv":
        names = sorted({str(name) for row in whole for name in row})
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerows([names, *([row.get(name) for name in names] for row in whole)])
        return text.getvalue().encode(errors="replace")
    buffer = io.BytesIO()
    texts = [{str(name): str(value).encode(errors="replace").decode() for name, value in row.items()} for row in whole]
    try:
        table = pa.Table.from_pylist(whole)
    except (pa.ArrowException, TypeError, OverflowError, UnicodeError):
        table = pa.Table.from_pylist(texts)
    parquet.write_table(table, buffer)
    return buffer.getvalue()


_REPORTED = tuple(
    ("prompts.jsonl", f'{{"prompt": "good"}}\n{line}\n'.encode())
    for line in (
        r'{"prompt": "a \ud83d"}', r'{"prompt": "a", "tag": "\ud83d"}', r'{"prompt": "a\u0000"}', '{"prompt": 3}',
        '{"prompt": null}', '{"prompt": "a", "prompt": "b"}', '{"prompt": "a", "x": NaN}',
        '{"prompt": "a", "x": 1e999}',
        '{"prompt": "a", "text": ["b"]}', '{"prompt": "a", "tag": "counting", "include": "cats"}', "[" * 100_000,
        f'{{"prompt": "a", "x": {"9" * 5000}}}', json.dumps({"prompt": "long " * 20_000}),
    )
)  # fmt: skip


@st.composite
def _contents(draw: DrawFn) -> tuple[str, bytes]:
    form = draw(st.sampled_from(_FORMATS))
    return f"prompts.{form}", draw(damaged(_as_bytes(_ROWS, form)))


@st.composite
def _rows(draw: DrawFn) -> tuple[str, bytes]:
    form = draw(st.sampled_from(_FORMATS))
    return f"prompts.{form}", _as_bytes(draw(spoiled(_ROWS)), form)


@st.composite
def _names(draw: DrawFn) -> tuple[str, bytes]:
    odd = odd_values().filter(lambda value: isinstance(value, str))
    return draw(odd | odd.map(lambda name: f"{name}.txt")), b"a\n"


def _write(described: tuple[str, bytes], folder: Path) -> None:
    name, content = described
    if name.startswith("prompts."):
        (folder / name).write_bytes(content)


def _read(described: tuple[str, bytes], folder: Path) -> None:
    problem: Exception | None = None
    try:
        command(["data", "check", "--", described[0]])
    except (UserError, RefusedError) as error:
        problem = error
    try:
        found = PromptSet.read(PromptsSection(path=described[0]))
    except UserError:
        if problem is None:
            raise AssertionError("data check accepts what a run refuses") from None
        raise
    for text in found.prompts:
        text.encode()
    json.dumps(found.metadata, default=str)


KINDS = (
    Kind("prompts: file", _contents(), _write, _read, known=_REPORTED),
    Kind("prompts: rows", _rows(), _write, _read),
    Kind("prompts: name", _names(), _write, _read),
)
