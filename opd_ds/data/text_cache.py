"""Encoded prompts and pictures on disk: `opd-ds data encode` writes them, runs with `model.text_encoders: cached` read
them.

A folder holds `manifest.json` (all that decides the numbers) and shards: safetensors files that appear whole or not at
all. An entry is named by the hash of the prompt, or of what the family calls a picture (`PromptEncoding`), so the
headers of the shards are the index, and several processes may add shards side by side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opd_ds.config.schema import RunConfig
from opd_ds.errors import UserError
from opd_ds.models import Conditioning, family_class
from opd_ds.utils.atomic_io import apply_umask, publish, write_whole
from opd_ds.utils.hashing import files_below, weights_sha256

FORMAT = 1  # also to be raised when a family encodes the same prompt to something else than before
MANIFEST_FILE = "manifest.json"
_COMMAND = "run `opd-ds data encode` with the --recipe or --config and the --set options of the run"


def encoders_identity(config: RunConfig, model: Path) -> dict[str, Any]:
    """What decides the encoding of a prompt, and of a picture where the family takes any. Reads the files of all
    encoders once, to hash them.

    Args:
        model: `config.model.path`, found.
    """
    index = model / "model_index.json"
    if not index.is_file():
        raise UserError(f"model.path = {model}: no model_index.json, so its text encoders are not known")
    kind = family_class(config.model.family)
    left_out = {"scheduler", *kind.pipeline_parts} - ({"vae"} if kind.takes_pictures else set())
    files = {
        str(file.relative_to(model)): weights_sha256(file)
        for part, loaded_by in sorted(json.loads(index.read_text(encoding="utf-8")).items())
        if isinstance(loaded_by, list) and loaded_by[0] and part not in left_out
        for file in files_below(model / part)
    }
    return {
        "format": FORMAT,
        "family": config.model.family,
        "precision": config.precision,
        "max_text_length": config.model.max_text_length or kind.default_text_length,
        "files": files,
    }


class TextCache:
    """The encodings in `folder`, which need not be there before the first access; a prompt without pictures is its own
    name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, identity: dict[str, Any]) -> None:
        """Make the folder one of `identity`.

        Raises:
            UserError: it is one of another identity already.
        """
        if (self.folder / MANIFEST_FILE).is_file():
            self.check(identity)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / MANIFEST_FILE, json.dumps(identity, indent=1) + "\n")

    def check(self, identity: dict[str, Any], names: Iterable[str] = ()) -> None:
        """Raise UserError unless the folder was written by encoders of `identity` and has all `names`."""
        wanted = list(dict.fromkeys(names))
        if not (self.folder / MANIFEST_FILE).is_file():
            raise UserError(f"text cache {self.folder}: there is none yet for {len(wanted)} prompts; {_COMMAND}")
        theirs = json.loads((self.folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        difference = _difference(theirs, identity)
        if difference:
            raise UserError(
                f"text cache {self.folder} was written by other encoders: {difference}; remove the folder, or "
                f"name another as model.text_cache, and {_COMMAND}"
            )
        self._refuse_missing(wanted)

    def missing(self, names: Iterable[str]) -> list[str]:
        """What is not encoded yet, each once, in order."""
        return [name for name in dict.fromkeys(names) if _digest(name) not in self._rows]

    def read(self, names: list[str]) -> Conditioning:
        """Encodings, one row each, on the CPU; where they differ in length, padded to the longest.

        Raises:
            UserError: one is not there.
        """
        self._refuse_missing(names)
        return Conditioning.cat([self._read(_digest(name)) for name in names])

    def add(self, rows: dict[str, Conditioning]) -> None:
        """Write encodings by name, each a single row, as one shard; rows without their padding."""
        entries = {
            f"{_digest(name)}.{key}": tensor.contiguous().cpu().clone()
            for name, row in rows.items()
            for key, tensor in trimmed(row).tensors.items()
        }
        shard = self.folder / f"shard-{_digest(''.join(map(_digest, rows)))[:16]}.safetensors"
        draft = shard.with_name(f".{shard.name}.tmp")
        save_file(entries, draft)
        apply_umask(draft)
        publish(draft, shard)
        self._rows.update(_opened(shard))

    @cached_property
    def _rows(self) -> dict[str, tuple[Any, list[str]]]:
        """By prompt: an open shard and the names of the prompt's tensors."""
        rows = {}
        for shard in sorted(self.folder.glob("shard-*.safetensors")):
            rows.update(_opened(shard))
        return rows

    def _read(self, digest: str) -> Conditioning:
        shard, names = self._rows[digest]
        return Conditioning({name: shard.get_tensor(f"{digest}.{name}") for name in names})

    def _refuse_missing(self, names: list[str]) -> None:
        missing = self.missing(names)
        if missing:
            prompt, _, hashed = missing[0].partition("\0")
            raise UserError(
                f"text cache {self.folder}: {len(missing)} of {len(set(names))} prompts are not encoded, the first: "
                f"{repr(prompt) if prompt else f'the reference picture with sha256 {hashed}'}; {_COMMAND}"
            )


def trimmed(row: Conditioning) -> Conditioning:
    """One encoded prompt without its padding; all of it where there is no `mask`.

    Only zeros are cut off, which `Conditioning` promises padding to be, so that padding again gives the same.
    """
    mask = row.tensors.get("mask")
    if mask is None:
        return row
    length = max(1, int(mask[0].nonzero().max()) + 1 if mask.any() else 0)
    return Conditioning(
        {
            name: tensor[:, :length]
            if tensor.ndim > 1 and tensor.shape[1] == mask.shape[1] and not tensor[:, length:].any()
            else tensor
            for name, tensor in row.tensors.items()
        }
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _opened(shard: Path) -> dict[str, tuple[Any, list[str]]]:
    try:
        handle = safe_open(shard, "pt")  # memory-mapped: a tensor is read when it is asked for
    except (SafetensorError, OSError) as error:
        raise UserError(f"text cache: {shard} is damaged ({error}); remove it and {_COMMAND}") from error
    rows: dict[str, tuple[Any, list[str]]] = {}
    keys: list[str] = handle.keys()
    for key in keys:
        digest, _, name = key.partition(".")
        rows.setdefault(digest, (handle, []))[1].append(name)
    return rows


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The first thing in which two identities differ; empty where they are one."""
    for key in ours:
        if theirs.get(key) != ours[key] and key != "files":
            return f"{key} was {theirs.get(key)!r} and is {ours[key]!r}"
    for file in sorted(theirs["files"].keys() | ours["files"].keys()):
        if theirs["files"].get(file) != ours["files"].get(file):
            state = (
                "is gone" if file not in ours["files"] else "is new" if file not in theirs["files"] else "has changed"
            )
            return f"{file} {state}"
    return ""
