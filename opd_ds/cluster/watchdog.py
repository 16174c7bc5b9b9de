"""Watching the other ranks: a rank that fails, dies or hangs ends the job everywhere, and says so once.

Backends do not: with NCCL, or when a node is gone without closing its connections, a collective waits until its
timeout. Each rank has a thread that writes a heartbeat into the store of the process group, reads its neighbour's,
and looks for a failure that some rank has claimed. The first to claim speaks; the others leave with its exit code.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from opd_ds.cluster.world import World

LOST_EXIT_CODE = 76
BEAT_SECONDS = 2.0
# A thread may starve while C++ holds the interpreter lock; a dead rank must still end the job within a minute.
LOST_SECONDS = 40.0
_STORE_TIMEOUT = timedelta(seconds=20)


@dataclass(frozen=True)
class Failure:
    """What ended the job: the rank that claimed it, and the exit code for all."""

    rank: int
    code: int
    text: str


@dataclass
class _Beat:
    """A heartbeat. `idle`: seconds since the rank last reported progress."""

    count: int
    doing: str
    idle: float


class Watchdog:
    """One rank's view of the others. `progress` and `claim` are for the main thread, the rest is its own thread's."""

    def __init__(self, world: World) -> None:
        self._world, self._beat_seconds, self._lost_seconds = world, BEAT_SECONDS, LOST_SECONDS
        self._host = socket.gethostname()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = TCPStore(address, port, is_master=False, timeout=_STORE_TIMEOUT, wait_for_workers=False)
        # torchrun keeps its store over restarts of the ranks.
        self._store = PrefixStore(f"opd_ds/watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", client)
        self._lock = threading.Lock()  # a store's client has one conversation at a time
        self._closing = threading.Event()
        self._leaving = False
        self._beat = _Beat(0, "starting", 0.0)
        self._last_progress = time.monotonic()
        self._hang_seconds: float | None = None
        self._hang_folder: Path | None = None
        self._neighbour = (world.rank + 1) % world.size
        self._heard: tuple[int, float] = (-1, time.monotonic())
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def progress(self, doing: str) -> None:
        """This rank makes progress. `doing` is shown when it stops."""
        self._beat.doing, self._last_progress = doing, time.monotonic()

    def watch_hangs(self, seconds: float, folder: Path) -> None:
        """When no rank has made progress for `seconds`, every rank leaves its stacks in `folder` and the job ends."""
        self._last_progress = time.monotonic()
        self._hang_seconds, self._hang_folder = seconds, folder

    def claim(self, code: int, text: str) -> Failure:
        """Say that this rank has failed; returns the failure that counts, which is the first claimed.

        Raises:
            RuntimeError: the store is gone, with the rank that held it.
        """
        mine = Failure(self._world.rank, code, text)
        with self._lock:
            first = self._store.compare_set("failed", "", json.dumps(asdict(mine)))
        return Failure(**json.loads(first))

    def failure(self) -> Failure | None:
        """What a rank has claimed, if any has."""
        with self._lock:
            if not self._store.check(["failed"]):
                return None
            return Failure(**json.loads(self._store.get("failed")))

    def silent_ranks(self) -> list[int]:
        """The ranks that send no heartbeat; it takes some beats to find out."""
        before = self._counts()
        time.sleep(3 * self._beat_seconds)
        return [rank for rank, count in self._counts().items() if count == before[rank] and rank != self._world.rank]

    def host_of(self, rank: int) -> str:
        """The rank's host, as far as it has said."""
        with self._lock:
            known = self._store.check([f"host/{rank}"])
            return self._store.get(f"host/{rank}").decode() if known else "an unknown host"

    def mark_exiting(self) -> None:
        """This rank is about to end because something failed: it still sends heartbeats, but decides nothing."""
        self._leaving = True

    def say_store_is_gone(self, error: BaseException) -> None:
        """Without the store nobody can be the first to claim: the first rank of the next node speaks, if there is one,
        else rank 1."""
        speaker = self._world.local_size if self._world.size > self._world.local_size else 1
        if self._world.rank == speaker:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _say(f"lost rank 0: its process was killed or its node is gone ({reason})")

    def close(self) -> None:
        """Stop watching: this rank is about to end, on purpose."""
        self._closing.set()

    # ---- the thread ----

    def _watch(self) -> None:
        try:
            with self._lock:
                self._store.set(f"host/{self._world.rank}", self._host)
            while not self._closing.wait(self._beat_seconds):
                self._give_sign()
                if self._leaving:
                    continue
                failure = self.failure()
                if failure is not None:
                    self._leave(failure.code)
                self._listen_to_neighbour()
                self._look_for_hang()
        except RuntimeError as error:  # the store does not answer: the rank that holds it is gone
            # On its way out by itself? Then its last message says why.
            if not self._closing.wait(self._beat_seconds) and not self._leaving:
                self.say_store_is_gone(error)
                self._leave(LOST_EXIT_CODE)

    def _leave(self, code: int) -> None:
        if not self._closing.is_set() and not self._leaving:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _give_sign(self) -> None:
        self._beat.count += 1
        self._beat.idle = time.monotonic() - self._last_progress
        with self._lock:
            self._store.set(f"beat/{self._world.rank}", json.dumps(asdict(self._beat)))

    def _beat_of(self, rank: int) -> _Beat | None:
        with self._lock:
            if not self._store.check([f"beat/{rank}"]):
                return None
            return _Beat(**json.loads(self._store.get(f"beat/{rank}")))

    def _counts(self) -> dict[int, int]:
        beats = {rank: self._beat_of(rank) for rank in range(self._world.size)}
        return {rank: -1 if beat is None else beat.count for rank, beat in beats.items()}

    def _listen_to_neighbour(self) -> None:
        beat, now = self._beat_of(self._neighbour), time.monotonic()
        count = -1 if beat is None else beat.count
        if count != self._heard[0]:
            self._heard = (count, now)
        elif now - self._heard[1] > self._lost_seconds:
            host = self.host_of(self._neighbour)
            text = (
                f"lost rank {self._neighbour} on {host}: no heartbeat for {self._lost_seconds:.0f} s; it was killed "
                "(out of memory?) or its node is gone"
            )
            if self.claim(LOST_EXIT_CODE, text).rank == self._world.rank:
                _say(text)
            self._linger(LOST_EXIT_CODE)

    def _linger(self, code: int) -> None:
        """Leave a little later than now: the rank that holds the store keeps it up until the others have read it."""
        time.sleep(2.5 * self._beat_seconds)
        self._leave(code)

    # ---- hangs ----

    def _look_for_hang(self) -> None:
        if self._hang_seconds is None or self._beat.idle < self._hang_seconds:
            return
        beats = [self._beat_of(rank) for rank in range(self._world.size)]
        if any(beat is None or beat.idle < self._hang_seconds for beat in beats):
            return  # one rank makes progress, the others wait for it
        self._leave_traces()
        with self._lock:
            self._store.set(f"where/{self._world.rank}", self._where())
        time.sleep(2.5 * self._beat_seconds)  # until the others have said where they are, too
        text = (
            f"no rank made progress for {self._hang_seconds:.0f} s, which run.hang_minutes allows; who waits where:\n"
        )
        text += "\n".join(self._position(rank, beat) for rank, beat in enumerate(beats) if beat is not None)
        text += f"\nstacks and collectives of every rank: {self._hang_folder}"
        if self.claim(LOST_EXIT_CODE, text).rank == self._world.rank:
            _say(text)
        self._linger(LOST_EXIT_CODE)

    def _position(self, rank: int, beat: _Beat) -> str:
        with self._lock:
            known = self._store.check([f"where/{rank}"])
            where = self._store.get(f"where/{rank}").decode() if known else "it does not say"
        return f"  rank {rank} on {self.host_of(rank)}, {beat.idle:.0f} s in {beat.doing!r}: {where}"

    def _where(self) -> str:
        """The innermost of our own lines, and the collective that is open, if any."""
        frame = sys._current_frames().get(self._main) if self._main is not None else None
        frames = traceback.extract_stack(frame) if frame is not None else []
        ours = [
            f for f in frames if f"{os.sep}opd_ds{os.sep}" in f.filename and f"{os.sep}engine{os.sep}" not in f.filename
        ]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else "outside opd_ds"
        active = [entry for entry in _collectives().get("entries", []) if not entry.get("retired", True)]
        if active:
            last = active[-1]
            place += f", in {last['profiling_name']} no. {last['collective_seq_id']} of {last['input_sizes']}"
        return place

    def _leave_traces(self) -> None:
        assert self._hang_folder is not None
        try:
            self._hang_folder.mkdir(parents=True, exist_ok=True)
            stem = self._hang_folder / f"rank-{self._world.rank:05d}"
            with stem.with_suffix(".stacks.txt").open("w") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
            stem.with_suffix(".collectives.json").write_text(json.dumps(_collectives(), indent=1))
        except OSError as error:  # a disk that hangs may be the very reason
            _say(f"[rank {self._world.rank}] could not leave stacks in {self._hang_folder}: {error}")


def _collectives() -> dict[str, Any]:
    """What torch's flight recorders know of this rank's collectives.

    There are two of them (torch 2.8 to 2.13, private): NCCL's has what ran on GPUs, the other, since torch 2.9, what
    gloo did. Each is in the build or not, and empty where its backend is not used.
    """
    traces: dict[str, Any] = {}
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None and not traces.get("entries"):
            traces = json.loads(dump())
    return traces


def _say(text: str) -> None:
    print(f"opd-ds: error: {text}", file=sys.stderr, flush=True)


_watchdog: Watchdog | None = None


def start_watchdog(world: World) -> Watchdog:
    """Start this process's watch; the process group is up."""
    global _watchdog
    _watchdog = Watchdog(world)
    return _watchdog


def current_watchdog() -> Watchdog | None:
    """This process's watch, if it has one."""
    return _watchdog
