"""A tracker that can neither stop nor slow down a run."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping

from PIL.Image import Image

from opd_ds.rewards import Clip
from opd_ds.runs.trackers.base import Tracker

CLOSE_SECONDS = 60.0
_MOST_WAITING = 10_000


class BackgroundTracker:
    """Runs a tracker in a thread: a service that does not answer keeps nobody waiting, and its errors are counted.

    Beside that, what a library does to the thread that starts it stays there: SwanLab takes over Ctrl-C where it is
    started in the main thread, and a run saves its state on that signal.

    Args:
        name: for messages.
        start: opens the tracker.
    """

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self._name, self._start = name, start
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MOST_WAITING)
        self._sent = self._written = self._lost = 0
        self._failed = False
        self._warned = threading.Lock()  # taken by the first who warns, for good
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def scalars(self, values: Mapping[str, float], round_index: int) -> None:
        """As `Tracker.scalars`; returns at once."""
        self._put(lambda tracker: tracker.scalars(values, round_index))

    def image(self, tag: str, image: Image, round_index: int) -> None:
        """As `Tracker.image`; returns at once. The image must not change afterwards."""
        self._put(lambda tracker: tracker.image(tag, image, round_index))

    def clip(self, tag: str, clip: Clip, round_index: int) -> None:
        """As `Tracker.clip`; returns at once."""
        self._put(lambda tracker: tracker.clip(tag, clip, round_index))

    def close(self, *, failed: bool) -> int:
        """Wait until all is written, `CLOSE_SECONDS` at most; returns how many records are lost, and warns of them."""
        self._failed = failed
        try:
            self._calls.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)
        except queue.Full:
            self._warn("does not answer")
        if self._thread.is_alive():
            self._lost = self._sent - self._written
        if self._lost:
            logging.getLogger("opd_ds").warning(
                "tracker %s: %d of %d records are lost; %s", self._name, self._lost, self._sent, _ELSEWHERE
            )
        return self._lost

    def _put(self, call: Callable[[Tracker], None]) -> None:
        self._sent += 1
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._lost += 1
            self._warn(f"does not answer, {_MOST_WAITING} records wait")

    def _work(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self._start()
        except (Exception, SystemExit) as error:  # whatever the library raises, the run goes on
            self._warn(f"did not start ({_first_line(error)})")
        while (call := self._calls.get()) is not None:
            if tracker is None:
                self._lost += 1
                continue
            try:
                call(tracker)
                self._written += 1
            except (Exception, SystemExit) as error:
                self._lost += 1
                self._warn(f"failed ({_first_line(error)})")
        if tracker is not None:
            try:
                tracker.close(failed=self._failed)
            except (Exception, SystemExit) as error:
                self._warn(f"failed at its end ({_first_line(error)})")

    def _warn(self, what: str) -> None:
        if self._warned.acquire(blocking=False):
            logging.getLogger("opd_ds").warning("tracker %s %s; the run goes on, %s", self._name, what, _ELSEWHERE)


_ELSEWHERE = "all numbers are in metrics.jsonl"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
