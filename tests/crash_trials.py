"""One run, killed with SIGKILL while it writes checkpoints, again and again, until it is done.

    python -m tests.crash_trials CONFIG KILLS SEED

Libraries are imported once; each attempt is a fork, so that a trial takes seconds. The moment of a kill is random
within the time a checkpoint takes to write, and every file operation of it is slowed, so that all its steps are hit.
Prints one JSON object: kills that met a checkpoint in the making, and where each attempt began.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import opd_ds.checkpoint.store
import opd_ds.runs.setup
import opd_ds.utils.atomic_io
from opd_ds.checkpoint.store import latest_checkpoint
from opd_ds.cluster.failures import report_and_exit
from opd_ds.cluster.rendezvous import prepare_environment
from opd_ds.cluster.world import World
from opd_ds.config.loading import load_config
from opd_ds.engine import init_group
from opd_ds.runs.train import train
from opd_ds.utils.logging import log_to_terminal

SLOWED = 0.02  # seconds before each flush
WINDOW = 0.35  # seconds; about what a slowed checkpoint takes


def attempt(file: Path) -> None:
    """In the child: go on with the run."""
    flush = opd_ds.utils.atomic_io.sync

    def slow(path: Path) -> None:
        time.sleep(SLOWED)
        flush(path)

    opd_ds.checkpoint.store.sync = opd_ds.utils.atomic_io.sync = slow
    try:
        world = World()
        prepare_environment(world)
        log_to_terminal()
        train(load_config(None, file, []), init_group(world), "auto")
        os._exit(0)
    except BaseException as error:
        report_and_exit(error)


def drafts(folder: Path) -> set[tuple[int, int]]:
    """Checkpoints in the making, told from what an earlier kill left under the same name."""
    found = set()
    for path in folder.glob(".writing-*"):
        with contextlib.suppress(FileNotFoundError):  # published in between
            found.add((path.stat().st_ino, path.stat().st_mtime_ns))
    return found


def main(file: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    folder = load_config(None, file, []).run.output_dir / "checkpoints"
    met, began = 0, []
    while True:
        newest = latest_checkpoint(folder)
        began.append(0 if newest is None else int(newest.name[-6:]))
        leftovers = drafts(folder)
        child = os.fork()
        if child == 0:
            log = os.open(file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            attempt(file)
        while met < kills and os.waitpid(child, os.WNOHANG) == (0, 0):
            if drafts(folder) - leftovers:
                time.sleep(chance.uniform(0, WINDOW))
                os.kill(child, signal.SIGKILL)
                met += 1
                os.waitpid(child, 0)
                break
            time.sleep(0.002)
        else:
            _, status = (0, 0) if met < kills else os.waitpid(child, 0)
            print(json.dumps({"kills": met, "began": began, "status": os.waitstatus_to_exitcode(status)}))
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
