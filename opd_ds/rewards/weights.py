"""Where published reward weights are looked for, and what is said when they are not there. Nothing is downloaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from opd_ds.errors import UserError
from opd_ds.utils.hashing import file_sha256

WEIGHTS_VARIABLE = "OPD_DS_WEIGHTS"


class WeightsMissingError(UserError):
    """A published file is absent; the message says which, from where, how large, and where it belongs."""


class WrongWeightsError(UserError):
    """A file is there but is not what it should be: another hash, other keys, other shapes."""


def weights_root() -> Path:
    """`$OPD_DS_WEIGHTS`, or `~/.cache/opd_ds/weights`."""
    return Path(os.environ.get(WEIGHTS_VARIABLE, "~/.cache/opd_ds/weights")).expanduser()


@dataclass(frozen=True)
class Weights:
    """One published file, or a folder in transformers' layout.

    Attributes:
        folder: its folder below `weights_root()`.
        source: hub repository (`org/name`) or the address it is published at.
        file: the file's name; None for a transformers folder (config.json, tokenizer, safetensors).
        size: for people, such as "3.9 GB".
        sha256: the expected hash or a prefix of it; None where none is published.
        contents: of a folder, for people.
    """

    folder: str
    source: str
    file: str | None
    size: str
    sha256: str | None = None
    contents: str = "config.json, tokenizer and model.safetensors"

    @property
    def place(self) -> Path:
        """Where the file (or folder) belongs."""
        place = weights_root() / self.folder
        return place / self.file if self.file else place

    @property
    def on_hub(self) -> bool:
        return "://" not in self.source

    def find(self) -> Path | None:
        """The file or folder, below `weights_root()` or in the hub's local cache; no network is asked."""
        marker = self.place if self.file else self.place / "config.json"
        if marker.is_file():
            return self.place
        if self.on_hub:
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(self.source, self.file or "config.json")
            if isinstance(cached, str):
                return Path(cached) if self.file else Path(cached).parent
        return None

    def require(self) -> Path:
        """`find()`, and the expected hash where one is known.

        Raises:
            WeightsMissingError: not there.
            WrongWeightsError: another hash.
        """
        path = self.find()
        if path is None:
            raise WeightsMissingError(self.missing())
        if self.sha256 is not None and path.is_file():
            found = file_sha256(path)
            if not found.startswith(self.sha256):
                raise WrongWeightsError(
                    f"{path}: sha256 is {found[:16]}..., expected {self.sha256[:16]}...; "
                    f"the file is damaged or another one; fetch it again from {self.source}"
                )
        return path

    def missing(self) -> str:
        """One line: file, source, size, hash, and where it is looked for."""
        digest = f"sha256 {self.sha256[:16]}" if self.sha256 else "hash not published"
        what = self.file or self.contents
        folder = self.place.parent if self.file else self.place
        if self.on_hub:
            place = f"`hf download {self.source}{f' {self.file}' if self.file else ''} --local-dir {folder}`"
        else:
            place = f"put it into {folder}"
        return f"weights not found: {what} from {self.source} ({self.size}, {digest}); {place}"
