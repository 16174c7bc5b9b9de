"""What a part is given: its time, the group, a scratch folder, and a record of what it finds, on disk at once."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from opd_ds.cluster.world import World
from opd_ds.engine import Group, init_group

Check = dict[str, Any]


@dataclass
class Session:
    """One part's.

    Attributes:
        out: the JSON of its checks, by name; written after each of them.
        scratch: shared with the other parts; ends with the command.
        results: where files for the user go.
        size: of `benchmarks.speed.sizes`.
        seconds: the part's time limit.
        earlier: checks of the parts before, by part and name.
    """

    out: Path
    scratch: Path
    results: Path
    size: str
    seconds: float
    earlier: dict[str, dict[str, Check]]
    checks: dict[str, Check] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @cached_property
    def group(self) -> Group:
        return init_group(World())

    @property
    def on_gpu(self) -> bool:
        return torch.cuda.is_available()

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.started + self.seconds - time.monotonic()

    @contextmanager
    def check(self, name: str) -> Iterator[Check]:
        """Something to find out: inside, the mapping is filled. An exception is kept there, and the part goes on.

        `ok` False marks what was computed but is wrong.
        """
        self._release()
        found: Check = {}
        self.checks[name] = {"error": "not finished"}
        self._write()
        started = time.monotonic()
        try:
            yield found
        except Exception as error:
            last = (str(error).splitlines() or [""])[0]
            found |= {"error": f"{type(error).__name__}: {last}"[:300], "traceback": traceback.format_exc()}
            print(found["traceback"], flush=True)
        found["took"] = round(time.monotonic() - started, 2)
        self.checks[name] = found
        self._write()
        print(f"{name}: { {key: value for key, value in found.items() if key != 'traceback'} }", flush=True)

    def _write(self) -> None:
        draft = self.out.with_suffix(".draft")
        draft.write_text(json.dumps(self.checks, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.out)

    def _release(self) -> None:
        """What the check before has built, cycles included."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def synchronise() -> None:
    """Wait until the device has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
