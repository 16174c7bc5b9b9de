"""Checkpoints that are whole or absent: drafts, hashes, publication by rename, and finding the newest whole one."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from opd_ds.engine import Group, write_shard
from opd_ds.errors import DamagedCheckpointError, UserError
from opd_ds.utils.atomic_io import sync, write_whole
from opd_ds.utils.hashing import file_sha256

STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
LATEST_FILE = "latest"
CHECKPOINTS_FOLDER = "checkpoints"
FORMAT = 4
LOSSES_VARIABLE = "OPD_DS_RESTARTS_FILE"  # where batch scripts count lost ranks; a checkpoint resets the count
_NAME = re.compile(r"^round-(\d{6})$")

# File name -> size in bytes and SHA-256.
Manifest = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Writing:
    """A checkpoint on its way: this rank's part is being written by a thread."""

    round: int
    state: dict[str, Any]
    part: Future[Manifest]


class CheckpointStore:
    """Folders `round-NNNNNN`, each with a `manifest.json` that names every file, its size and its hash.

    A checkpoint is written under a hidden name, flushed to the disk and appears by one rename; `latest` is moved after
    that. All methods are collective.

    Args:
        keep: how many of the newest stay; the newest is never deleted.
        in_background: `save` copies the state and returns; a thread writes, and a later call publishes.
    """

    def __init__(self, folder: Path, keep: int, group: Group, *, in_background: bool = False) -> None:
        self.folder, self._keep, self._group, self._in_background = folder, keep, group, in_background
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: _Writing | None = None

    # ---- writing ----

    def save(self, done: int, state: dict[str, Any], entries: dict[str, Tensor]) -> Path:
        """Save the state after `done` rounds; returns where it is, or will be once it is published.

        Args:
            state: equal on all ranks, fit for JSON.
            entries: this rank's tensors, on the CPU; not to be changed afterwards.

        Raises:
            UserError: the disk is full or fails; what was published before is untouched.
        """
        self.finish()
        draft = self._draft(done)
        with self._writes(done):
            if self._group.world.is_main:
                self._clear_leftovers()
                draft.mkdir(parents=True)
        self._writing = _Writing(done, state, self._worker.submit(self._write_part, draft, entries))
        if not self._in_background:
            self.finish()
        return self.place(done)

    def publish_if_written(self) -> None:
        """Publish the checkpoint on its way if all ranks have written their part; does not wait."""
        if self._writing is not None and all(self._group.gather(self._writing.part.done())):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint on its way, if there is one, and publish it.

        Raises:
            UserError: as `save`.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        with self._writes(writing.round):
            part = writing.part.result()
        parts = self._group.gather(part)
        with self._writes(writing.round):
            if self._group.world.is_main:
                self._publish(writing, {name: facts for each in parts for name, facts in each.items()})

    def _write_part(self, draft: Path, entries: dict[str, Tensor]) -> Manifest:
        world = self._group.world
        if not draft.is_dir():
            raise UserError(
                f"run.output_dir: rank 0 made {draft}, but rank {world.rank} does not see it; give a folder that all "
                "nodes share"
            )
        return _facts(write_shard(entries, draft, world.rank, world.size))

    def _publish(self, writing: _Writing, manifest: Manifest) -> None:
        draft, target = self._draft(writing.round), self.place(writing.round)
        state = draft / STATE_FILE
        state.write_text(json.dumps({"format": FORMAT} | writing.state, indent=1), encoding="utf-8")
        manifest |= _facts(state)
        (draft / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync(draft / MANIFEST_FILE)
        for name in manifest:  # safetensors writes files that only their owner may read
            shutil.copymode(draft / MANIFEST_FILE, draft / name)
        sync(draft)
        if target.exists():
            _rename_aside(target, "abandoned")
        draft.rename(target)
        sync(self.folder)
        write_whole(self.folder / LATEST_FILE, target.name + "\n")
        try:
            self._tidy_up(target)
        except OSError as error:  # the checkpoint is there; on NFS a folder that somebody reads does not go away
            logging.getLogger("opd_ds").warning("%s is saved, but not all that it replaces is gone: %s", target, error)

    def _tidy_up(self, newest: Path) -> None:
        """Forget lost ranks, delete what is older than `keep`."""
        if losses := os.environ.get(LOSSES_VARIABLE):
            Path(losses).unlink(missing_ok=True)
        earlier = [path for path in _published(self.folder) if path.name < newest.name]
        for old in earlier[: max(0, len(earlier) - (self._keep - 1))]:
            _remove(old)

    @contextmanager
    def _writes(self, done: int) -> Iterator[None]:
        """A full or broken disk, on any rank, is one error for all, and leaves no half checkpoint behind."""
        try:
            with self._group.raise_on_any_rank():
                try:
                    yield
                except OSError as error:
                    raise UserError(self._explain(done, error)) from error
        except UserError:
            if self._group.world.is_main:
                shutil.rmtree(self._draft(done), ignore_errors=True)
            raise

    def _explain(self, done: int, error: OSError) -> str:
        kept = latest_checkpoint(self.folder)
        intact = f"{kept.name} is intact: go on from it with --resume auto" if kept else "there is no earlier one"
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f" ({_free_space(self.folder)} free; free some space or lower run.keep_checkpoints)"
        return f"the checkpoint of round {done} could not be written to {self.folder}: {reason}; {intact}"

    def _draft(self, done: int) -> Path:
        return self.folder / f".writing-{self.place(done).name}"

    def place(self, done: int) -> Path:
        """Where the checkpoint of round `done` is, or will be."""
        return self.folder / f"round-{done:06d}"

    def _clear_leftovers(self) -> None:
        for path in self.folder.glob(".writing-*"):
            shutil.rmtree(path)
        for path in self.folder.glob(".deleting-*"):
            shutil.rmtree(path, ignore_errors=True)  # somebody may still read it

    # ---- finding ----

    def newest_whole(self) -> tuple[Path | None, list[Path]]:
        """The newest checkpoint whose files are as written, and the damaged ones that are newer, which are logged.

        Raises:
            UserError: there are checkpoints and all of them are damaged or quarantined (the run is not started from
                scratch, now or at the next try), or a rank cannot read them.
        """
        candidates, aside = self._group.broadcast((_published(self.folder)[::-1], _set_aside_in(self.folder)))
        damaged: list[Path] = []
        for candidate in candidates:
            problems = self.problems(candidate)
            if not problems:
                return candidate, damaged
            damaged.append(candidate)
            logging.getLogger("opd_ds").warning("%s is damaged (%s)", candidate.name, problems[0])
        if candidates:
            raise UserError(
                f"{self.folder}: all {len(candidates)} checkpoints are damaged, the newest first: "
                f"{', '.join(path.name for path in candidates)}; restore one of them, or give another run.output_dir"
            )
        if aside:
            raise UserError(
                f"{self.folder}: all checkpoints are quarantined: {', '.join(path.name for path in aside)}; give "
                "one of them as --resume PATH, or another run.output_dir"
            )
        return None, []

    def made_by(self, job: str) -> Path | None:
        """The newest whole checkpoint that the batch job `job` made, that is before it was requeued."""
        made = self._group.broadcast([path for path in _published(self.folder)[::-1] if _job_of(path) == job])
        return next((candidate for candidate in made if not self.problems(candidate)), None)

    def problems(self, checkpoint: Path) -> list[str]:
        """What is wrong with the files of a checkpoint; the ranks share the reading.

        Raises:
            UserError: a rank cannot read what others can: that is no damage.
        """
        world = self._group.world
        found: list[str] = []
        absent: list[str] = []
        with self._group.raise_on_any_rank():
            try:
                manifest = _read_manifest(checkpoint)
                absent = [name for name in manifest if not (checkpoint / name).is_file()]
                found = _checked(checkpoint, manifest, world.rank, world.size)
            except DamagedCheckpointError as error:
                absent = [] if (checkpoint / MANIFEST_FILE).is_file() else [MANIFEST_FILE]
                found = [str(error)]
            except OSError as error:
                raise UserError(f"{checkpoint} cannot be read: {error}; all nodes need to read it") from error
        seen = self._group.gather((absent, found))
        for rank, (lacking, _) in enumerate(seen):
            alone = set(lacking) - set(seen[0][0]) or set(seen[0][0]) - set(lacking)
            if alone:
                raise UserError(
                    f"{checkpoint}: ranks 0 and {rank} do not see the same files ({min(alone)}); "
                    "run.output_dir must be a folder that all nodes share"
                )
        return list(dict.fromkeys(line for _, part in seen for line in part))

    def go_back_to(self, checkpoint: Path, done: int, damaged: Collection[Path]) -> None:
        """A resume from `checkpoint`, of `done` rounds, quarantines the later ones here, whole or `damaged`: they are
        renamed, not deleted.
        """
        here = checkpoint.resolve()
        later = [
            path for path in _published(self.folder) if path.resolve() != here and path.name >= self.place(done).name
        ]
        self._set_aside(self._group.broadcast([path for path in later if path in damaged]), "damaged")
        self._set_aside(self._group.broadcast([path for path in later if path not in damaged]), "abandoned")

    def _set_aside(self, checkpoints: list[Path], why: str) -> None:
        with self._group.raise_on_any_rank():
            if self._group.world.is_main:
                for checkpoint in checkpoints:
                    place = _rename_aside(checkpoint, why)
                    logging.getLogger("opd_ds").warning("%s is quarantined: renamed to %s", checkpoint.name, place.name)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest published checkpoint in `folder`, unchecked."""
    published = _published(folder)
    return published[-1] if published else None


def _published(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.match(path.name))


def any_checkpoint(folder: Path) -> Path | None:
    """The newest published checkpoint in `folder`, or else one that was quarantined."""
    return latest_checkpoint(folder) or next(iter(_set_aside_in(folder)), None)


def _set_aside_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("abandoned-*round-*")) + sorted(folder.glob("damaged-*round-*"))


def find_checkpoint(place: Path) -> Path:
    """`place` itself, or the newest published checkpoint of the run there, unchecked."""
    return latest_checkpoint(place / CHECKPOINTS_FOLDER) or place


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's `state.json`.

    Raises:
        UserError: not a checkpoint of this program.
    """
    file = checkpoint / STATE_FILE
    if not file.is_file():
        raise UserError(f"{checkpoint}: no {STATE_FILE} there; {_named_instead(checkpoint)}")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); give another checkpoint") from error
    if state.get("format") != FORMAT:
        raise UserError(f"{file}: format {state.get('format', 1)}; this version of opd-ds reads format {FORMAT}")
    return state


def _named_instead(place: Path) -> str:
    """What to name where `place` is no checkpoint."""
    if inside := latest_checkpoint(place / CHECKPOINTS_FOLDER):
        return f"this is a run; name a checkpoint, as {inside}"
    if beside := _published(place.parent):
        more = f" and {len(beside) - 5} older" if len(beside) > 5 else ""
        return f"there are {', '.join(path.name for path in beside[-5:])}{more}"
    return "give a folder named round-NNNNNN"


def _job_of(checkpoint: Path) -> str | None:
    try:
        return read_state(checkpoint).get("job")
    except UserError:  # damaged, or of another version: not one to go on from
        return None


def refuse_damaged(checkpoint: Path) -> None:
    """Check every file of a checkpoint, in this process alone.

    Raises:
        UserError: one is not what was written.
    """
    try:
        problems = _checked(checkpoint, _read_manifest(checkpoint), 0, 1)
    except DamagedCheckpointError as error:
        problems = [str(error)]
    if problems:
        raise UserError(f"{checkpoint}: damaged ({problems[0]}); give another checkpoint")


def _read_manifest(checkpoint: Path) -> Manifest:
    try:
        manifest: Manifest = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
        for facts in manifest.values():
            int(facts["bytes"]), str(facts["sha256"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST_FILE} is missing or not what was written ({error!r})") from error
    if STATE_FILE not in manifest:
        raise DamagedCheckpointError(f"{MANIFEST_FILE} does not name {STATE_FILE}")
    return manifest


def _checked(checkpoint: Path, manifest: Manifest, rank: int, size: int) -> list[str]:
    """What is wrong with every `size`-th file, from the `rank`-th on."""
    problems = []
    for name in sorted(manifest)[rank::size]:
        file, facts = checkpoint / name, manifest[name]
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != facts["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}")
        elif file_sha256(file) != facts["sha256"]:
            problems.append(f"{name} is not what was written: its SHA-256 differs")
    return problems


# ---- the disk ----


def _facts(file: Path) -> Manifest:
    """Flush the file to the disk and say what is in it."""
    sync(file)
    return {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}}


def _remove(checkpoint: Path) -> None:
    """Under another name first: a removal that is cut off leaves no half checkpoint."""
    doomed = checkpoint.with_name(f".deleting-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _rename_aside(checkpoint: Path, why: str) -> Path:
    """`<why>-<name>`, or `<why>-2-<name>` and so on: nothing is overwritten."""
    numbers = ("", *(f"{count}-" for count in range(2, 1000)))
    places = (checkpoint.with_name(f"{why}-{number}{checkpoint.name}") for number in numbers)
    place = next(place for place in places if not place.exists())
    checkpoint.rename(place)
    return place


def _free_space(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"
