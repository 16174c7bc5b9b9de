"""The shard files of a checkpoint: entries `kind/start/parameter` (see `opd_ds.engine.state`), one file per rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd_ds.errors import DamagedCheckpointError
from opd_ds.utils.atomic_io import apply_umask
from opd_ds.utils.disk_errors import disk_error


def write_shard(entries: dict[str, Tensor], folder: Path, rank: int, size: int) -> Path:
    """This rank's entries as one safetensors file; returns it.

    Raises:
        OSError: as the disk does.
    """
    file = folder / f"shard-{rank:05d}-of-{size:05d}.safetensors"
    try:
        save_file(entries, file)
        apply_umask(file)
    except SafetensorError as error:
        disk = disk_error(error, file)
        if disk is None:
            raise
        raise disk from error
    return file


class ShardReader:
    """Any stretch of any parameter out of the shard files of a checkpoint, however many ranks wrote them.

    Raises:
        DamagedCheckpointError: a file is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[tuple[str, str], list[tuple[int, int, str, Any]]] = defaultdict(list)
        for file in sorted(folder.glob("shard-*.safetensors")):
            try:
                opened = safe_open(file, framework="pt")
                for key in opened.keys():  # noqa: SIM118  # not a dict
                    kind, start, name = key.split("/", 2)
                    (numel,) = opened.get_slice(key).get_shape()
                    self._entries[kind, name].append((int(start), numel, key, opened))
            except Exception as error:  # safetensors raises its own kinds, and ValueError for what is not ours
                raise DamagedCheckpointError(f"{file}: not a whole shard ({error})") from error
        self.kinds = {kind for kind, _ in self._entries}

    def kinds_of(self, name: str) -> set[str]:
        """What there is of a parameter."""
        return {kind for kind in self.kinds if (kind, name) in self._entries}

    def parameters(self) -> list[str]:
        return sorted({name for _, name in self._entries})

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements `start` to `start + numel` of the flattened parameter: float32 [numel] on the CPU.

        Raises:
            DamagedCheckpointError: some of them are in no file.
        """
        result = torch.empty(numel)
        found = 0
        for first, last, piece in self._pieces(kind, name, start, start + numel):
            result[first - start : last - start] = piece
            found += last - first
        if found != numel:
            raise DamagedCheckpointError(
                f"{self._folder}: {kind} of {name!r} has {found} of the elements {start} to {start + numel}"
            )
        return result

    def _pieces(self, kind: str, name: str, start: int, end: int) -> Iterator[tuple[int, int, Tensor]]:
        for begin, numel, key, opened in self._entries.get((kind, name), []):
            first, last = max(start, begin), min(end, begin + numel)
            if first < last:
                yield first, last, opened.get_slice(key)[first - begin : last - begin]
