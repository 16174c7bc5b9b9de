"""A set of prompts, packed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from opd_ds.config.sections import PromptsSection
from opd_ds.data.packed import mappings, texts
from opd_ds.data.readers import NEGATIVE, Problem, locate, rows
from opd_ds.errors import UserError
from opd_ds.utils.pictures import Picture

_HASHED = json.JSONEncoder(sort_keys=True, default=str)
_HASHED_AT_ONCE = 256  # rows: a call of the encoder takes longer than a row


class _Digest:
    """SHA-256 of one JSON list of all rows, which is never made as a whole."""

    def __init__(self) -> None:
        self._sha256, self._rows, self._between = hashlib.sha256(b"["), list[Any](), ""

    def add(self, row: Any) -> None:
        self._rows.append(row)
        if len(self._rows) == _HASHED_AT_ONCE:
            self._encode()

    def _encode(self) -> None:
        if self._rows:
            self._sha256.update(f"{self._between}{_HASHED.encode(self._rows)[1:-1]}".encode())
            self._between = ", "
            self._rows.clear()

    def hexdigest(self) -> str:
        self._encode()
        self._sha256.update(b"]")
        return self._sha256.hexdigest()


def negative_prompt(metadata: Mapping[str, Any], default: str) -> str:
    """The negative prompt of the prompt with `metadata`; `default`: of those that have none of their own."""
    own = metadata.get(NEGATIVE)
    return default if own is None else str(own)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order, each with its metadata (empty for .txt), and a hash of all.

    Attributes:
        pictures: the reference pictures of each prompt; empty where the set has none.
    """

    prompts: Sequence[str]
    metadata: Sequence[dict[str, Any]]
    sha256: str
    pictures: Sequence[tuple[Picture, ...]] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def repeats(self) -> int:
        """How many prompts stand further up already, with the same pictures."""
        asked = (hash((prompt, self.pictures_of(row))) for row, prompt in enumerate(self.prompts))
        return len(self) - len(np.unique(np.fromiter(asked, np.int64, len(self))))

    def pictures_of(self, row: int) -> tuple[Picture, ...]:
        return self.pictures[row] if self.pictures else ()

    def first(self, count: int | None) -> PromptSet:
        """The first `count` prompts, or all."""
        return replace(
            self, prompts=self.prompts[:count], metadata=self.metadata[:count], pictures=self.pictures[:count]
        )

    @cached_property
    def own_negatives(self) -> bool:
        """Whether a prompt has a negative prompt of its own."""
        return any(metadata.get(NEGATIVE) is not None for metadata in self.metadata)

    @classmethod
    def read(cls, source: Path | PromptsSection, key: str = "prompts") -> PromptSet:
        """Read a file, or what a section of the config chooses; blank lines are skipped.

        Args:
            key: of the config, for messages.

        Raises:
            UserError: missing, empty, not UTF-8 or malformed, naming key, file and line.
        """
        chosen = PromptsSection(path=str(source)) if isinstance(source, Path) else source
        place = locate(chosen, key)
        kind = "prompt file" if isinstance(place, Path) and place.is_file() else "data set"
        prompts, metadata, pictures = texts(), mappings(), list[tuple[Picture, ...]]()
        digest, found = _Digest(), False
        for row in rows(place, chosen):
            if isinstance(row, Problem):
                raise UserError(f"{key}: {kind} {place}{', ' if row.place else ''}{row.place}: {row.what}")
            digest.add((row.prompt, row.metadata, *row.asked[1:]))
            found = True
            prompts.append(row.prompt)
            metadata.append(row.metadata)
            if chosen.pictures:
                pictures.append(row.pictures)
        if not found:
            raise UserError(f"{key}: {kind} {place} has no prompts")
        return cls(prompts.done(), metadata.done(), digest.hexdigest(), tuple(pictures))
