"""A part in a process of its own. It loads libraries first and then waits for a line of JSON that says which part, so
that the next part's start overlaps with the present one's work.

    python -m benchmarks.gpu.worker
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
from pathlib import Path

from opd_ds.cluster.rendezvous import prepare_environment
from opd_ds.cluster.world import World

_STACKS_BEFORE_END = 3.0  # seconds: who is about to be ended says where it is


def main() -> None:
    """See the module; an empty line, or none: nothing to do."""
    prepare_environment(World())
    from benchmarks.gpu.session import Session
    from opd_ds.runs import setup
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    assert setup  # loaded for what it imports
    line = sys.stdin.readline()
    if not line.strip():
        return
    told = json.loads(line)
    prepare_environment(World())  # once more: the port that was free may be taken by now
    faulthandler.dump_traceback_later(max(1.0, told["seconds"] - _STACKS_BEFORE_END))
    session = Session(
        out=Path(told["out"]),
        scratch=Path(told["scratch"]),
        results=Path(told["results"]),
        size=told["size"],
        seconds=told["seconds"],
        earlier=told["earlier"],
    )
    module, function = told["function"].split(":")
    getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(session)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # nothing is left to do; DeepSpeed's threads may take their time
