"""Encoded prompts and pictures on disk: `opd-ds data encode` writes them, runs with `model.text_encoders: cached` read
them.

A folder holds `manifest.json` (all that decides the numbers) and shards: safetensors files that appear whole or not at
all. An entry is named by the hash of the prompt, or of what the family calls a picture (`PromptEncoding`), so the
headers of the shards are the index, and several processes may add shards side by side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opd_ds.config.schema import RunConfig
from opd_ds.errors import UserError
from opd_ds.models import Conditioning, family_class
from opd_ds.utils.atomic_io import apply_umask, publish, write_whole
from opd_ds.utils.hashing import files_below, weights_sha256

FORMAT = 1  # also to be raised when a family encodes the same prompt to something else than before
MANIFEST_FILE = "manifest.json"
_OPEN = 64  # shards at once: each holds its header in memory
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
        self._opened = lru_cache(_OPEN)(_opened)

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
        asked = list(dict.fromkeys(names))
        return [asked[place] for place in np.flatnonzero(self._index.places(asked) < 0)]

    def read(self, names: list[str]) -> Conditioning:
        """Encodings, one row each, on the CPU; where they differ in length, padded to the longest.

        Raises:
            UserError: one is not there.
        """
        self._refuse_missing(names)
        return Conditioning.cat(
            [self._read(name, place) for name, place in zip(names, self._index.places(names), strict=True)]
        )

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
        self.__dict__.pop("_index", None)  # it is made anew when it is asked

    @cached_property
    def _index(self) -> _Index:
        return _Index(sorted(self.folder.glob("shard-*.safetensors")))

    def _read(self, name: str, place: int) -> Conditioning:
        shard, tensors = self._index.entry(place)
        opened = self._opened(shard)
        return Conditioning({tensor: opened.get_tensor(f"{_digest(name)}.{tensor}") for tensor in tensors})

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


class _Index:
    """Where each entry is, in 40 bytes: a cache may have millions.

    Raises:
        UserError: a shard is damaged.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards, kinds = shards, dict[tuple[str, ...], int]()
        digests, places = [np.empty(0, _DIGEST)], [np.empty((0, 2), np.int32)]
        for number, shard in enumerate(shards):
            tensors: dict[str, list[str]] = {}
            for key in _opened(shard).keys():  # noqa: SIM118  # no mapping
                digest, _, tensor = key.partition(".")
                tensors.setdefault(digest, []).append(tensor)
            try:
                digests.append(np.array([bytes.fromhex(digest) for digest in tensors], _DIGEST))
            except ValueError as error:  # no digest
                raise _damaged(shard, error) from error
            own = [(number, kinds.setdefault(tuple(names), len(kinds))) for names in tensors.values()]
            places.append(np.array(own, np.int32).reshape(-1, 2))
        self._digests, self._places, self._kinds = np.concatenate(digests), np.concatenate(places), list(kinds)
        order = np.argsort(self._digests)
        self._digests, self._places = self._digests[order], self._places[order]

    def places(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Of each name the place of its entry; -1 where there is none."""
        if not len(self._digests):
            return np.full(len(names), -1)
        wanted = np.fromiter((hashlib.sha256(name.encode()).digest() for name in names), _DIGEST, len(names))
        found = np.minimum(np.searchsorted(self._digests, wanted), len(self._digests) - 1)
        return np.where(self._digests[found] == wanted, found, -1)

    def entry(self, place: int) -> tuple[Path, tuple[str, ...]]:
        """The shard, and the names of the entry's tensors."""
        shard, kind = self._places[place]
        return self._shards[shard], self._kinds[kind]


_DIGEST = np.dtype("S32")  # SHA-256; numpy compares such bytes whole, as all are equally long


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _opened(shard: Path) -> Any:
    try:
        return safe_open(shard, "pt")  # memory-mapped: a tensor is read when it is asked for
    except (SafetensorError, OSError) as error:
        raise _damaged(shard, error) from error


def _damaged(shard: Path, error: Exception) -> UserError:
    return UserError(f"text cache: {shard} is damaged ({error}); remove it and {_COMMAND}")


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
