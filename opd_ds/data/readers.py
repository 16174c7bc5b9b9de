"""Reading prompts: files with one prompt a line, rows of objects or tables, and data sets in the `datasets` library's
forms, here or on the hub.

A reader gives rows and what is wrong with others, in file order, so that a run can stop at the first problem and
`opd-ds data check` can go on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any, cast

from opd_ds.config.paths import PACKAGE_PREFIX, find_local, looked_for, resolve_path
from opd_ds.config.sections import PromptsSection
from opd_ds.errors import UserError, nearest, shown
from opd_ds.utils.pictures import Picture
from opd_ds.utils.stand_ins import stand_in

# A prompt's own negative prompt.
NEGATIVE = "negative_prompt"
# Columns that a run itself reads, whatever `metadata` names.
READ = ("height", "width", NEGATIVE)
FILES = (".txt", ".jsonl", ".parquet", ".csv")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # Unicode's categories: control, format, white space
_SHOWN = 5  # values in a message
_PLAIN = json.JSONEncoder(ensure_ascii=False, default=str)
_TOO_DEEP = "lists and objects are nested too deeply"


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt, what stands beside it, and where: `line 3`, `row 3`."""

    prompt: str
    metadata: dict[str, Any]
    place: str
    pictures: tuple[Picture, ...] = ()

    @property
    def asked(self) -> tuple[str, ...]:
        """What makes two rows repeats of one: the prompt, and what its pictures hold."""
        if not self.pictures:
            return (self.prompt,)
        return self.prompt, *(picture.sha256 for picture in self.pictures)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line or row, or, without `place`, with all of it."""

    what: str
    place: str = ""


@dataclass(frozen=True, slots=True)
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
    found = None if value.startswith(PACKAGE_PREFIX) else find_local(value, key)
    if not is_file:
        if found is not None and found.is_dir():
            return found.resolve()
        if found is None and _HUB_ID.fullmatch(value) and not value.startswith((".", "~")):
            return value
        raise UserError(
            f"{key} = {shown(value)}: allowed are files that end in {', '.join(FILES)}, folders of data sets that "
            "exist, and hub ids 'org/name'"
        )
    if not value.startswith(PACKAGE_PREFIX) and (found is None or found.is_dir()):
        reason = "is a folder" if found else f"no such file{looked_for(value)}"
        raise UserError(f"{key} = {shown(value)}: {reason}; data/README.md says where the public prompt sets come from")
    for name in ("subset", "split", "streaming"):
        if asked := getattr(chosen, name):
            raise UserError(f"{key}.{name} = {asked!r} is for data sets, and {value} is a file; remove it")
    if value.endswith(".txt") and (chosen.column != "prompt" or chosen.where or chosen.metadata or chosen.pictures):
        raise UserError(f"{key}: {value} has no columns to choose from; remove column, pictures, where and metadata")
    return resolve_path(value, key)


def rows(source: Path | str, chosen: PromptsSection) -> Iterator[Row | Problem]:
    """What `chosen` keeps of `source`, which `locate` gave; problems in their places among the rows."""
    seen: set[bytes] = set()
    kept = 0
    try:
        if isinstance(source, Path) and source.is_file() and (instead := stand_in(source)):
            yield Problem(instead)
            return
        for row in map(_without_flaw, _prompts(source, chosen)):
            if isinstance(row, Row) and chosen.unique:
                name = hashlib.blake2b("\0".join(row.asked).encode(), digest_size=16).digest()
                if name in seen:
                    continue
                seen.add(name)
            yield row
            kept += isinstance(row, Row)
            if kept == chosen.limit:
                return
    except OSError as error:
        yield Problem(f"cannot be read: {error.strerror or error}")


def _without_flaw(row: Row | Problem) -> Row | Problem:
    """A problem where tokenizers, hashes and reward servers could not take the row."""
    if isinstance(row, Problem):
        return row
    if "\0" in row.prompt + (row.metadata.get(NEGATIVE) or ""):
        return Problem("the prompt holds a NUL character; remove it", row.place)
    if row.prompt.isascii() and not row.metadata:
        return row
    try:
        _PLAIN.encode([[row.prompt, row.metadata]]).encode()
    except RecursionError:
        return Problem(_TOO_DEEP, row.place)
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        return Problem(
            f"holds {half!r}, one half of a character (a lone surrogate); remove it or write both", row.place
        )
    return row


def _is_blank(text: str) -> bool:
    if text[:1].isalnum():  # nearly all
        return False
    return all(unicodedata.category(character) in _INVISIBLE for character in text)


def _prompts(source: Path | str, chosen: PromptsSection) -> Iterator[Row | Problem]:
    if isinstance(source, Path) and source.suffix == ".txt":
        for line in _lines(source):
            yield line if isinstance(line, Problem) else Row(line.columns["line"].strip(), {}, line.place)
        return
    folder = Path() if isinstance(source, str) else source.parent if source.is_file() else source
    for record in _where(_records(source, chosen), chosen):
        yield record if isinstance(record, Problem) else _row(record, chosen, folder)


def _row(record: _Record, chosen: PromptsSection, folder: Path) -> Row | Problem:
    columns, wanted = record.columns, chosen.metadata
    prompt = columns.get(chosen.column)
    if not isinstance(prompt, str) or _is_blank(prompt):
        texts = [name for name, value in columns.items() if isinstance(value, str) and name != chosen.column]
        hint = f"; texts are under {_listed(texts)}" if texts else ""
        return Problem(f"needs a non-empty text under {shown(chosen.column, 40)}{hint}", record.place)
    absent = [name for name in wanted or () if name not in columns]
    if absent:
        return Problem(f"has no {shown(absent[0], 40)}, which `metadata` names", record.place)
    negative = columns.get(NEGATIVE)
    if negative is not None and not isinstance(negative, str):
        said = f"{NEGATIVE} = {shown(negative, 40)}: allowed are texts, or null for model.negative_prompt"
        return Problem(said, record.place)
    others = [name for name in columns if name != chosen.column and name not in chosen.pictures]
    names = others if wanted is None else [*wanted, *(name for name in READ if name in others and name not in wanted)]
    try:
        pictures = tuple(_pictures(record, chosen.pictures, folder))
    except UserError as error:
        return Problem(str(error), record.place)
    return Row(prompt.strip(), {name: columns[name] for name in names}, record.place, pictures)


def _pictures(record: _Record, names: Sequence[str], folder: Path) -> Iterator[Picture]:
    """The pictures of a row: at least one where there are `names`, of which all but the first may be empty.

    Raises:
        UserError: a column or picture is not there, or is damaged.
    """
    for name in names:
        if name not in record.columns:
            there = _listed(sorted(record.columns))
            raise UserError(f"has no {shown(name, 40)}, which `pictures` names; there are {there}")
        value = record.columns[name]
        if _is_empty(value):
            if name != names[0]:
                continue
            raise UserError(f"has no picture under {shown(name, 40)}; prompts without pictures are a set of their own")
        for one in value if isinstance(value, list) else [value]:
            source, said = _source(one, name, folder)
            yield Picture.find(source, record.place, said)


def _is_empty(value: Any) -> bool:
    return value in (None, "", b"", []) or (isinstance(value, dict) and not any(value.values()))


def _source(value: Any, name: str, folder: Path) -> tuple[Path | bytes, str]:
    """Where a picture is, and what messages call it; `datasets` stores bytes, a path, or both."""
    if isinstance(value, dict) and value.keys() >= {"bytes", "path"}:
        value = value["bytes"] or value["path"]
    if isinstance(value, bytes) and value:
        return value, name
    if isinstance(value, str) and value and "\0" not in value:
        return folder / Path(value).expanduser(), f"{name} = {shown(value, 60)}"
    raise UserError(f"{name} = {shown(value, 40)}: needs the path of a picture, its bytes, or a list of these")


def _where(records: Iterable[_Record | Problem], chosen: PromptsSection) -> Iterator[_Record | Problem]:
    """The records whose columns hold what is asked for; a table without any is a problem that names what it has."""
    if not chosen.where:
        yield from records
        return
    asked = {name: set(map(str, values)) if isinstance(values, tuple) else {str(values)}
             for name, values in chosen.where.items()}  # fmt: skip
    held: dict[str, set[str]] = {name: set() for name in asked}
    columns: set[str] = set()
    kept = False
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
        similar = nearest(absent[0], columns)
        yield Problem(f"where: no column {shown(absent[0], 40)}; there are {_listed(sorted(columns))}.{similar}")
        return
    found = "; ".join(f"{name} has {_listed(sorted(values))}" for name, values in held.items())
    wanted = ", ".join(f"{name} = {shown(value, 40)}" for name, value in chosen.where.items())
    yield Problem(f"where: no row has {wanted}; {found}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shown(name, 40) for name in names[:_SHOWN]) + more


# ---- the formats ----


def _records(source: Path | str, chosen: PromptsSection) -> Iterator[_Record | Problem]:
    if isinstance(source, Path) and source.suffix == ".jsonl":
        return _objects(source)
    if isinstance(source, Path) and source.suffix == ".csv":
        return _table(source)
    return _columns(source, chosen)


def _lines(path: Path) -> Iterator[_Record | Problem]:
    """Lines that hold something; a line is what universal newlines make one, whatever else Unicode calls a break."""
    with path.open("rb") as stream:
        yield from _decoded(raw for block in stream for raw in block.splitlines())


def _decoded(lines: Iterable[bytes]) -> Iterator[_Record | Problem]:
    for number, raw in enumerate(lines, 1):
        place = f"line {number}"
        try:  # files put together by `cat` have byte-order marks further down, too
            text = raw.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
        except UnicodeDecodeError:
            yield Problem("not UTF-8; convert the file to UTF-8", place)
            continue
        if "\0" in text:
            yield Problem("holds NUL characters (UTF-16?); convert the file to UTF-8", place)
        elif not _is_blank(text):
            yield _Record({"line": text}, place)


def _objects(path: Path) -> Iterator[_Record | Problem]:
    for line in _lines(path):
        if isinstance(line, Problem):
            yield line
            continue
        try:
            value = _STRICT.decode(line.columns["line"])
        except json.JSONDecodeError as error:
            yield Problem(f"not JSON ({error.msg})", line.place)
            continue
        except ValueError as error:
            yield Problem(f"not JSON ({error})", line.place)
            continue
        except RecursionError:
            yield Problem(_TOO_DEEP, line.place)
            continue
        yield _Record(value, line.place) if isinstance(value, dict) else Problem("needs an object {...}", line.place)


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeats([name for name, _ in pairs], "key")
    return dict(pairs)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no number; write null")
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_named_once, parse_constant=_finite, parse_float=_finite)


def _refuse_repeats(names: Sequence[str], what: str) -> None:
    if len(set(names)) == len(names):
        return
    name, times = max(Counter(names).items(), key=lambda counted: counted[1], default=("", 0))
    if times > 1:
        raise ValueError(f"the {what} {shown(name, 40)} stands there {times} times")


def _table(path: Path) -> Iterator[_Record | Problem]:
    """Every value is a text; a quoted one may go over several lines, so places are those where rows end."""
    problems = [line for line in _lines(path) if isinstance(line, Problem)]
    if problems:
        yield from problems
        return
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            _refuse_repeats(reader.fieldnames or (), "column")
            for values in reader:
                place = f"line {reader.line_num}"
                if None in values or None in values.values():
                    yield Problem(f"has not the {len(reader.fieldnames or ())} columns of the first line", place)
                else:
                    yield _Record(values, place)
        except (csv.Error, ValueError) as error:
            yield Problem(f"not CSV ({error})", f"line {reader.line_num}")


def _columns(source: Path | str, chosen: PromptsSection) -> Iterator[_Record | Problem]:
    is_file = isinstance(source, Path) and source.is_file()
    try:
        found = _parquet(Path(source), chosen) if is_file else _data_set(source, chosen)
        for number, columns in enumerate(found, 1):
            yield _Record(columns, f"row {number}")
    except UserError:
        raise
    except Exception as error:  # many libraries below, with kinds of their own; the user needs the place and the reason
        reason = (str(error).splitlines() or [""])[0][:200]
        kind = "parquet" if is_file else "a data set"
        yield Problem(f"not readable as {kind} ({type(error).__name__}: {reason})")


def _parquet(file: Path, chosen: PromptsSection) -> Iterator[dict[str, Any]]:
    """By pyarrow: `datasets` takes [, *, ? and :: in a file's name for patterns, and reads other files instead."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as opened:
        _refuse_repeats(opened.schema_arrow.names, "column")
        names = [field.name for field in opened.schema_arrow if _is_read(field, chosen)]
        for batch in opened.iter_batches(columns=names):
            yield from batch.to_pylist()


def _data_set(source: Path | str, chosen: PromptsSection) -> Iterable[dict[str, Any]]:
    opened = _open(source, chosen)
    if isinstance(opened, dict):
        if len(opened) > 1:
            splits = _listed(list(map(str, opened)))
            raise UserError(f"data set {source}: has the splits {splits}; choose one with split")
        opened = next(iter(opened.values()))
    if not opened.features:
        return cast(Iterable[dict[str, Any]], opened)
    # Columns that are no text or number would be decoded row by row.
    unread = [field.name for field in opened.features.arrow_schema if not _is_read(field, chosen)]
    for name in opened.features.keys() & set(chosen.pictures):
        opened = opened.cast_column(name, _undecoded(opened.features[name]))
    return cast(Iterable[dict[str, Any]], opened.remove_columns(unread) if unread else opened)


def _undecoded(feature: Any) -> Any:
    """The type of a column of `datasets`, with images as they are stored."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    inside = getattr(feature, "feature", None)  # of a list
    return type(feature)(datasets.Image(decode=False)) if isinstance(inside, datasets.Image) else feature


def _is_read(field: Any, chosen: PromptsSection) -> bool:
    return field.name in chosen.pictures or not _holds_bytes(field.type)


def _open(source: Path | str, chosen: PromptsSection) -> Any:
    import datasets

    if isinstance(source, str):
        return datasets.load_dataset(source, chosen.subset, split=chosen.split, streaming=chosen.streaming)
    if any((source / name).is_file() for name in ("state.json", "dataset_dict.json")):  # as save_to_disk leaves them
        saved = datasets.load_from_disk(str(source))
        if chosen.split is None or not isinstance(saved, dict):
            return saved
        if chosen.split not in saved:
            raise ValueError(f"no split {chosen.split!r}; there are {', '.join(map(str, saved))}")
        return saved[chosen.split]
    if has_magic(str(source)) or "::" in str(source):
        raise UserError(
            f"data set {source}: `datasets` takes [, *, ? and :: in the name of a folder for a pattern; rename it"
        )
    return datasets.load_dataset(str(source), chosen.subset, split=chosen.split, streaming=chosen.streaming)


def _holds_bytes(kind: Any) -> bool:
    """Whether pyarrow's type has bytes somewhere inside, as images, sound and video have."""
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    inside = [kind.value_type] if types.is_dictionary(kind) else [kind.field(at).type for at in range(kind.num_fields)]
    return any(map(_holds_bytes, inside))
