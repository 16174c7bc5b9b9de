"""Publishing checkpoints so that a half-written one is never taken for a whole one."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_ds.engine import Group
from opd_ds.errors import UserError

STATE_FILE = "state.json"
CHECKPOINTS_FOLDER = "checkpoints"
_NAME = re.compile(r"^round-(\d{6})$")


class CheckpointStore:
    """Folders `round-NNNNNN`. A checkpoint is written under a hidden name and appears by one rename."""

    def __init__(self, folder: Path, keep: int, group: Group) -> None:
        self._folder, self._keep, self._group = folder, keep, group

    def save(self, round_index: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """`write(folder)` is called on every rank (it may be collective); then rank 0 publishes. Collective."""
        target = self._folder / f"round-{round_index:06d}"
        draft = self._folder / f".writing-{target.name}"
        if self._group.world.is_main:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        self._group.barrier()
        write(draft)
        _flush(draft)
        self._group.barrier()
        if self._group.world.is_main:
            (draft / STATE_FILE).write_text(json.dumps(state, indent=1))
            _flush(draft)
            if target.exists():  # a resumed run came here again
                shutil.rmtree(target)
            draft.rename(target)
            _sync(self._folder)
            for old in _published(self._folder)[: -self._keep]:
                shutil.rmtree(old)
        self._group.barrier()
        return target

    def latest(self) -> Path | None:
        """The newest published checkpoint."""
        return latest_checkpoint(self._folder)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest published checkpoint in `folder`."""
    published = _published(folder)
    return published[-1] if published else None


def _published(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.match(p.name) and (p / STATE_FILE).is_file())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's `state.json`.

    Raises:
        UserError: not a checkpoint of this program.
    """
    file = checkpoint / STATE_FILE
    if not file.is_file():
        raise UserError(f"--resume {checkpoint}: no {STATE_FILE} there; give a folder named round-NNNNNN, or 'auto'")
    return json.loads(file.read_text())


def refuse_other_run(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    """A resume must continue the same run: what decides its numbers has to be equal.

    Raises:
        UserError: naming the first differing entry and both values.
    """
    before, now = _flat(saved), _flat(current)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"resume from {checkpoint.name}: {key} was {before.get(key)!r} and is now {now.get(key)!r}; "
                "give the same value, or another run.output_dir to start a new run"
            )


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
