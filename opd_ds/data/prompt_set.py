"""A set of prompts in memory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from opd_ds.config.sections import PromptsSection
from opd_ds.data.readers import Problem, Row, locate, rows
from opd_ds.errors import UserError


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order, each with its metadata (empty for .txt), and a hash of both."""

    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def repeats(self) -> int:
        """How many prompts stand further up already."""
        return len(self.prompts) - len(set(self.prompts))

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
        found: list[Row] = []
        for row in rows(place, chosen):
            if isinstance(row, Problem):
                raise UserError(f"{key}: {kind} {place}{', ' if row.place else ''}{row.place}: {row.what}")
            found.append(row)
        if not found:
            raise UserError(f"{key}: {kind} {place} has no prompts")
        pairs = [(row.prompt, row.metadata) for row in found]
        digest = hashlib.sha256(json.dumps(pairs, sort_keys=True, default=str).encode()).hexdigest()
        return cls(tuple(row.prompt for row in found), tuple(row.metadata for row in found), digest)
