"""Reading prompt files: one prompt a line (.txt), one object a line (.jsonl), or a table (.parquet, .csv).

In objects and tables the prompt stands under `prompt`; everything beside it is the prompt's metadata.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ds.errors import UserError


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order, each with its metadata (empty for .txt), and a hash of both."""

    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def read(cls, path: Path) -> PromptSet:
        """Read `path`; blank lines are skipped.

        Raises:
            UserError: missing, empty, not UTF-8 or malformed, naming file and line.
        """
        if not path.is_file():
            raise UserError(f"prompt file {path} does not exist")
        rows = _table(path) if path.suffix in (".parquet", ".csv") else _lines(path)
        if not rows:
            raise UserError(f"prompt file {path} has no prompts")
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
        return cls(tuple(prompt for prompt, _ in rows), tuple(meta for _, meta in rows), digest)


Row = tuple[str, dict[str, Any]]


def _lines(path: Path) -> list[Row]:
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"prompt file {path}, line {line}: not UTF-8; convert the file to UTF-8") from error
    return [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _table(path: Path) -> list[Row]:
    from datasets import Dataset

    kind = {".parquet": Dataset.from_parquet, ".csv": Dataset.from_csv}[path.suffix]
    try:
        records = kind(str(path), keep_in_memory=True).to_list()
    except Exception as error:  # the readers below raise kinds of their own; the user needs the file and the reason
        raise UserError(f"prompt file {path}: not readable as {path.suffix[1:]} ({error})".splitlines()[0]) from error
    return [_record(path, f"row {number}", record) for number, record in enumerate(records, 1)]


def _row(path: Path, number: int, line: str) -> Row:
    if path.suffix != ".jsonl":
        return line.strip(), {}
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"prompt file {path}, line {number}: not JSON ({error.msg})") from error
    return _record(path, f"line {number}", record)


def _record(path: Path, where: str, record: Any) -> Row:
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise UserError(f"prompt file {path}, {where}: needs an object with a non-empty text under 'prompt'")
    return record["prompt"], {key: value for key, value in record.items() if key != "prompt"}
