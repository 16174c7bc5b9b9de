"""The output folder: is it writable, how fast, does a checkpoint fit, is it the same one on every node."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from opd_ds.config.schema import RunConfig
from opd_ds.doctor.findings import Finding, Seen, one_line, size_text, who
from opd_ds.errors import UserError
from opd_ds.utils.folders import existing_part

WRITTEN = 64 * 2**20
SHARED = "same output folder"


def look_at_disk(folder: Path, needed: int | None) -> Iterator[Seen]:
    """Free space and write speed where `folder` is or will be; `needed` in bytes, None where unknown.

    Raises:
        UserError: nothing can be written there.
    """
    place = existing_part(folder)
    free = shutil.disk_usage(place).free
    found, problem = f"{size_text(free)} free ({place})", None
    if needed is not None:
        found += f"; checkpoints need {size_text(needed)}"
        if free < needed:
            problem = f"{size_text(needed - free)} short: set run.output_dir to a larger disk or keep fewer checkpoints"
    yield Seen("output folder", found, problem)
    yield Seen("write speed", f"{write_speed(place):.0f} MB/s ({size_text(WRITTEN)} with fsync)")


def write_speed(folder: Path) -> float:
    """MB/s (10^6 bytes) of writing and fsyncing 64 MiB; the file has no name and cannot stay behind.

    Raises:
        UserError: the folder cannot be written.
    """
    block = os.urandom(2**20)  # nothing a file system could compress
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            started = time.perf_counter()
            for _ in range(WRITTEN // len(block)):
                file.write(block)
            os.fsync(file.fileno())
            return WRITTEN / (time.perf_counter() - started) / 1e6
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); set run.output_dir or --output-dir") from error


def checkpoint_bytes(config: RunConfig, folder: Path, parameters: int) -> int:
    """What is still to come in the output folder: the checkpoints that are kept, and the next one beside them."""
    there = len(list((folder.expanduser() / "checkpoints").glob("round-*")))
    of_moment = 5 if config.optimizer.type == "AdamW8bit" else 4  # a code and its scale
    bytes_each = 4 * (1 + config.weight_snapshots) + 2 * of_moment  # fp32 master, averages and the like; moments
    return max(1, config.run.keep_checkpoints + 1 - there) * parameters * bytes_each


class Token:
    """A file that rank 0 leaves in the output folder for the others to see; removed when left. `path` is None where
    there is no folder, or `failure` says why nothing could be written."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.path: str | None = None
        self.failure = ""

    def __enter__(self) -> Token:
        if self._folder is not None:
            try:
                handle, self.path = tempfile.mkstemp(prefix=".opd-ds-doctor-", dir=existing_part(self._folder))
                os.close(handle)
            except OSError as error:
                self.failure = one_line(error)
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            Path(self.path).unlink(missing_ok=True)


def sees(path: str) -> bool:
    """Whether rank 0's token is here; listing the folder first makes a network file system ask its server."""
    token = Path(path)
    return token.parent.is_dir() and token.name in os.listdir(token.parent)


def shared_folder(folder: Path, visible: list[bool], hosts: list[str]) -> Finding:
    """`visible`: by rank, whether it saw the token."""
    blind = [rank for rank, saw in enumerate(visible) if not saw]
    if not blind:
        return Finding(SHARED, f"yes, all ranks see what rank 0 writes in {existing_part(folder)}")
    return Finding(
        SHARED,
        f"no: {who(blind, hosts)} did not see what rank 0 wrote in {existing_part(folder)}",
        "checkpoints and evaluation need one folder for all nodes: set run.output_dir to a shared file system",
    )
