"""The ranks of an allocation before, and without, a process group: they meet at a key-value store.

A doctor has to report that a group does not start, so it cannot depend on one.
"""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta
from typing import Any

from opd_ds.cluster.store import open_store
from opd_ds.cluster.world import World
from opd_ds.doctor.findings import who

_STOP = "stop"
_TOLD = "told"


class LostRanksError(Exception):
    """On rank 0: not all ranks answered in time. The message names them and says what to do."""


class StoppedError(Exception):
    """On the other ranks: rank 0 has ended the examination, and says why."""


class Meeting:
    """All ranks. Every rank makes the same calls in the same order, `to_main` and `from_main` by turns, so those that
    wait can be told to stop. `timeout` is in seconds, for each call."""

    def __init__(self, world: World, timeout: float) -> None:
        self.world, self.timeout = world, timeout
        self.hosts = [socket.gethostname()]
        self._calls = 0
        self._store: Any = None

    def meet(self) -> None:
        """Wait for all ranks and learn their `hosts`.

        Raises:
            LostRanksError: on rank 0, when some did not arrive.
            UserError: rank 0's address cannot be used or reached.
        """
        if self.world.size == 1:
            return
        self._store = open_store(self.world, self.timeout)
        self.hosts = self.from_main(self.to_main(self.hosts[0]))

    def to_main(self, value: Any) -> list[Any]:
        """`value` (as JSON) of every rank in rank order on rank 0, an empty list elsewhere.

        Raises:
            LostRanksError: on rank 0, when some gave none within the timeout; the others are told to stop.
        """
        if self._store is None:
            return [value]
        name = self._next()
        self._set(f"{name}/{self.world.rank}", json.dumps(value))
        if not self.world.is_main:
            return []
        keys = [f"{name}/{rank}" for rank in range(self.world.size)]
        late = self._late(keys)
        if late:
            self._store.set(self._next(), json.dumps([_STOP]))
            raise LostRanksError(self._explain(late))
        return [json.loads(text) for text in self._store.multi_get(keys)]

    def from_main(self, value: Any = None) -> Any:
        """Rank 0's `value` (as JSON) on every rank; all leave within moments of each other.

        Raises:
            StoppedError: rank 0 has ended the examination.
        """
        if self._store is None:
            return value
        name = self._next()
        if self.world.is_main:
            self._store.set(name, json.dumps([_TOLD, value]))
            return value
        word, *told = json.loads(self._get(name))
        if word == _STOP:
            raise StoppedError
        return told[0]

    def _next(self) -> str:
        self._calls += 1
        return f"opd-ds-doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{self._calls}"

    def _set(self, key: str, text: str) -> None:
        try:
            self._store.set(key, text)
        except Exception as error:  # torch raises a kind per cause: reset, timeout, closed
            raise StoppedError from error

    def _get(self, key: str) -> Any:
        try:
            # Rank 0 may itself be waiting for a rank that is late.
            self._store.wait([key], timedelta(seconds=3 * self.timeout))
            return self._store.get(key)
        except Exception as error:
            raise StoppedError from error

    def _late(self, keys: list[str]) -> list[int]:
        deadline = time.monotonic() + self.timeout
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                return [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            time.sleep(0.02)
        return []

    def _explain(self, late: list[int]) -> str:
        if len(self.hosts) == self.world.size:
            return f"{who(late, self.hosts)} gave no answer within {self.timeout:g} s; read what they print"
        missing = who(late, ["?"] * self.world.size)
        return (
            f"{missing} did not arrive within {self.timeout:g} s: not started, or cannot reach "
            f"{_address()}; check what those processes print, names and firewall between the nodes, or raise --timeout"
        )


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR not set)')}:{os.environ.get('MASTER_PORT', '?')}"
