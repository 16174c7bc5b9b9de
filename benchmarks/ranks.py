"""One module in several processes, a rank each, on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from opd_ds.cluster.rendezvous import unused_port
from opd_ds.cluster.world import LOCALHOST
from opd_ds.config.paths import package_root
from opd_ds.errors import UserError

_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def outside_of_ranks() -> dict[str, str]:
    """The environment without what makes a process a rank of a launch: for one that is a run of its own."""
    return {key: value for key, value in os.environ.items() if key not in _OF_A_LAUNCHER}


def run_ranks(module: str, arguments: list[str], ranks: int, logs: Path, more: Mapping[str, str]) -> None:
    """`python -m module arguments` on `ranks` processes; each writes `logs`/rank<N>.log.

    Args:
        more: environment.

    Raises:
        UserError: a process failed, naming the logs.
    """
    logs.mkdir(parents=True, exist_ok=True)
    packages = [str(package_root().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(packages),
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(unused_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        **more,
    }
    processes = []
    for rank in range(ranks):
        with (logs / f"rank{rank}.log").open("wb") as log:
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", module, *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise UserError(f"{module} ended with exit codes {codes}; see {logs}/rank*.log")
