"""Reading prompts: files with one prompt a line, rows of objects or tables, and data sets in the `datasets` library's
forms, here or on the hub.

A reader gives rows and what is wrong with others, in file order, so that a run can stop at the first problem and
`opd-ds data check` can go on.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ds.config.paths import PACKAGE_PREFIX, resolve_path
from opd_ds.config.sections import PromptsSection
from opd_ds.errors import UserError, nearest

FILES = (".txt", ".jsonl", ".parquet", ".csv")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MEDIA = ("Image", "Audio", "Video", "Pdf")  # classes of datasets, which not all of its versions have
_SHOWN = 8  # values in a message


@dataclass(frozen=True)
class Row:
    """A prompt, what stands beside it, and where: `line 3`, `row 3`."""

    prompt: str
    metadata: dict[str, Any]
    place: str


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line or row, or, without `place`, with all of it."""

    what: str
    place: str = ""


@dataclass(frozen=True)
class _Record:
    columns: dict[str, Any]
    place: str


def locate(chosen: PromptsSection, key: str) -> Path | str:
    """The file or folder of `chosen`, or a hub id.

    Raises:
        UserError: nothing is there, or `chosen` asks a file what only data sets have, naming `key`.
    """
    value = chosen.path
    is_file = value.startswith(PACKAGE_PREFIX) or Path(value).suffix in FILES
    if not is_file:
        if Path(value).expanduser().is_dir():
            return Path(value).expanduser().resolve()
        if _HUB_ID.fullmatch(value) and not value.startswith((".", "~")) and not Path(value).exists():
            return value
        raise UserError(
            f"{key} = {value!r}: allowed are files that end in {', '.join(FILES)}, folders of data sets that exist, "
            "and hub ids 'org/name'"
        )
    if not value.startswith(PACKAGE_PREFIX) and not Path(value).expanduser().is_file():
        raise UserError(
            f"{key} = {value!r}: no such file, looked for from {Path.cwd()}; data/README.md says where the public "
            "prompt sets come from"
        )
    for name in ("subset", "split", "streaming"):
        if asked := getattr(chosen, name):
            raise UserError(f"{key}.{name} = {asked!r} is for data sets, and {value} is a file; remove it")
    if value.endswith(".txt") and (chosen.column != "prompt" or chosen.where or chosen.metadata):
        raise UserError(f"{key}: {value} has no columns to choose from; remove column, where and metadata")
    return resolve_path(value, key)


def rows(source: Path | str, chosen: PromptsSection) -> Iterator[Row | Problem]:
    """What `chosen` keeps of `source`, which `locate` gave; problems in their places among the rows."""
    seen: set[str] = set()
    kept = 0
    for row in _prompts(source, chosen):
        if isinstance(row, Row) and chosen.unique:
            if row.prompt in seen:
                continue
            seen.add(row.prompt)
        yield row
        kept += isinstance(row, Row)
        if kept == chosen.limit:
            return


def _prompts(source: Path | str, chosen: PromptsSection) -> Iterator[Row | Problem]:
    if isinstance(source, Path) and source.suffix == ".txt":
        for line in _lines(source):
            yield line if isinstance(line, Problem) else Row(line.columns["line"].strip(), {}, line.place)
        return
    for record in _where(_records(source, chosen), chosen):
        yield record if isinstance(record, Problem) else _row(record, chosen)


def _row(record: _Record, chosen: PromptsSection) -> Row | Problem:
    columns, wanted = record.columns, chosen.metadata
    prompt = columns.get(chosen.column)
    if not isinstance(prompt, str) or not prompt.strip():
        others = [name for name, value in columns.items() if isinstance(value, str) and name != chosen.column]
        hint = f"; texts are under {', '.join(map(repr, others[:_SHOWN]))}" if others else ""
        return Problem(f"needs a non-empty text under {chosen.column!r}{hint}", record.place)
    absent = [name for name in wanted or () if name not in columns]
    if absent:
        return Problem(f"has no {absent[0]!r}, which `metadata` names", record.place)
    names = [name for name in columns if name != chosen.column] if wanted is None else wanted
    return Row(prompt, {name: columns[name] for name in names}, record.place)


def _where(records: Iterable[_Record | Problem], chosen: PromptsSection) -> Iterator[_Record | Problem]:
    """The records whose columns hold what is asked for; a table without any is a problem that names what it has."""
    asked = {name: set(map(str, values)) if isinstance(values, tuple) else {str(values)}
             for name, values in chosen.where.items()}  # fmt: skip
    held: dict[str, set[str]] = {name: set() for name in asked}
    columns: set[str] = set()
    kept = not asked
    for record in records:
        if isinstance(record, Problem):
            yield record
            continue
        columns |= record.columns.keys()
        for name, values in held.items():
            values.add(str(record.columns.get(name)))
        if all(str(record.columns.get(name)) in values for name, values in asked.items()):
            kept = True
            yield record
    if kept or not columns:
        return
    if absent := sorted(asked.keys() - columns):
        known = ", ".join(sorted(columns))
        yield Problem(f"where: no column {absent[0]!r}; there are {known}.{nearest(absent[0], columns)}")
        return
    found = "; ".join(f"{name} has {', '.join(sorted(values)[:_SHOWN])}" for name, values in held.items())
    yield Problem(f"where: no row has {', '.join(f'{name} = {v!r}' for name, v in chosen.where.items())}; {found}")


# ---- the formats ----


def _records(source: Path | str, chosen: PromptsSection) -> Iterator[_Record | Problem]:
    if isinstance(source, Path) and source.suffix == ".jsonl":
        return _objects(source)
    if isinstance(source, Path) and source.suffix == ".csv":
        return _table(source)
    return _data_set(source, chosen)


def _lines(path: Path) -> Iterator[_Record | Problem]:
    """Lines that hold something; a line is what universal newlines make one, whatever else Unicode calls a break."""
    for number, raw in enumerate(path.read_bytes().removeprefix(_BYTE_ORDER_MARK).splitlines(), 1):
        place = f"line {number}"
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            yield Problem("not UTF-8; convert the file to UTF-8", place)
            continue
        if "\0" in text:
            yield Problem("holds NUL characters (UTF-16?); convert the file to UTF-8", place)
        elif text.strip():
            yield _Record({"line": text}, place)


def _objects(path: Path) -> Iterator[_Record | Problem]:
    for line in _lines(path):
        if isinstance(line, Problem):
            yield line
            continue
        try:
            value = json.loads(line.columns["line"])
        except json.JSONDecodeError as error:
            yield Problem(f"not JSON ({error.msg})", line.place)
            continue
        yield _Record(value, line.place) if isinstance(value, dict) else Problem("needs an object {...}", line.place)


def _table(path: Path) -> Iterator[_Record | Problem]:
    """Every value is a text; a quoted one may go over several lines, so places are those where rows end."""
    problems = [line for line in _lines(path) if isinstance(line, Problem)]
    if problems:
        yield from problems
        return
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for values in reader:
                place = f"line {reader.line_num}"
                if None in values or None in values.values():
                    yield Problem(f"has not the {len(reader.fieldnames or ())} columns of the first line", place)
                else:
                    yield _Record(values, place)
        except csv.Error as error:
            yield Problem(f"not CSV ({error})", f"line {reader.line_num}")


def _data_set(source: Path | str, chosen: PromptsSection) -> Iterator[_Record | Problem]:
    kind = "parquet" if isinstance(source, Path) and source.is_file() else "a data set"
    try:
        opened = _open(source, chosen)
        if isinstance(opened, dict):
            if len(opened) > 1:
                yield Problem(f"has the splits {', '.join(map(str, opened))}; choose one with split")
                return
            opened = next(iter(opened.values()))
        for number, columns in enumerate(_readable(opened), 1):
            yield _Record(columns, f"row {number}")
    except UserError:
        raise
    except Exception as error:  # many libraries below, with kinds of their own; the user needs the place and the reason
        reason = (str(error).splitlines() or [""])[0]
        yield Problem(f"not readable as {kind} ({type(error).__name__}: {reason})")


def _open(source: Path | str, chosen: PromptsSection) -> Any:
    import datasets

    if isinstance(source, str):
        return datasets.load_dataset(source, chosen.subset, split=chosen.split, streaming=chosen.streaming)
    if source.is_file():
        return datasets.load_dataset("parquet", data_files=str(source), split="train", streaming=True)
    if any((source / name).is_file() for name in ("state.json", "dataset_dict.json")):  # as save_to_disk leaves them
        saved = datasets.load_from_disk(str(source))
        if chosen.split is None or not isinstance(saved, dict):
            return saved
        if chosen.split not in saved:
            raise ValueError(f"no split {chosen.split!r}; there are {', '.join(map(str, saved))}")
        return saved[chosen.split]
    return datasets.load_dataset(str(source), chosen.subset, split=chosen.split, streaming=chosen.streaming)


def _readable(opened: Any) -> Any:
    """Without the columns that are no text or number, which would be decoded row by row."""
    large = [
        name
        for name, feature in (opened.features or {}).items()
        if type(feature).__name__ in _MEDIA or getattr(feature, "dtype", None) in ("binary", "large_binary")
    ]
    return opened.remove_columns(large) if large else opened
