"""What a batch job gets where nobody says it: environment, variables, time to save."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from opd_ds.cluster.slurm import limit_seconds
from opd_ds.errors import UserError

LEAST_SIGNAL_SECONDS = 600
_MOST_SIGNAL_SECONDS = 65535  # sbatch takes no more
# Where things are, for the programs of a run; no secrets, which belong to the prologue.
_PASSED = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "OPD_DS_WEIGHTS",
    "TORCH_HOME",
    "TORCH_EXTENSIONS_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
)


def passed_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of this shell that a job gets, too."""
    return {name: environment[name] for name in _PASSED if environment.get(name)}


def active_environment() -> str:
    """A file to source, or a folder whose `bin` goes into PATH; empty: none that has a name."""
    prefix = Path(sys.prefix)
    activate = prefix / "bin" / "activate"
    if sys.prefix != sys.base_prefix and activate.is_file():
        return str(activate)
    return str(prefix) if (prefix / "bin" / "opd-ds").is_file() else ""  # conda's


def prologue_file(file: Path | None) -> str:
    """Its absolute name, or an empty string.

    Raises:
        UserError: there is no such file.
    """
    if file is None:
        return ""
    if not file.is_file():
        raise UserError(f"--prologue {str(file)!r}: no such file; give one with lines for bash: module, conda, export")
    return str(file.absolute())


def signal_time(wanted: int | None, planned: float, output_dir: Path, time: str) -> int:
    """Seconds before the limit at which a job is told to save.

    Args:
        wanted: what the user says; None: enough for two rounds and a checkpoint, as far as they are known.
        planned: seconds for these as planned, or 0.
        output_dir: of the run, whose rounds were measured if it ran before.
        time: the limit, empty for SLURM's own.

    Raises:
        UserError: the limit is no time, or is not longer.
    """
    known = max(planned, 2 * _longest_round(output_dir / "metrics.jsonl"), LEAST_SIGNAL_SECONDS)
    seconds = wanted or min(round(known), _MOST_SIGNAL_SECONDS)
    limit = limit_seconds(time) if time else None
    if limit is not None and limit <= seconds:
        raise UserError(
            f"--time {time}: the job would be told to save {seconds} s before that, which is at its start; give a "
            "longer time, or fewer --signal-seconds"
        )
    return seconds


def _longest_round(metrics: Path) -> float:
    """Seconds, by the last hundred rounds of a run."""
    lines = metrics.read_text(encoding="utf-8").splitlines()[-100:] if metrics.is_file() else []
    return max((_seconds(line) for line in lines), default=0.0)


def _seconds(line: str) -> float:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # a kill has cut off the last one
        return 0.0
    return sum(value for key, value in row.items() if key.startswith("seconds/"))
