"""A SLURM batch script for one run, written from `launchers/slurm_train.sbatch`; and handing it to sbatch."""

from __future__ import annotations

import re
import shlex
import subprocess
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from opd_ds.config.paths import package_root
from opd_ds.errors import UserError

FIRST_LINES = "#!/usr/bin/env bash\n# Written by `opd-ds launch`; `opd-ds launch` may overwrite it.\n"
_SETTINGS_END = "# ---- Nothing below needs editing ----\n"


@dataclass(frozen=True)
class Job:
    """What the batch script is made of; an empty string leaves an option to SLURM's own default."""

    train_arguments: list[str]
    work_dir: Path
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    partition: str = ""
    account: str = ""
    time: str = ""
    job_name: str = "opd-ds"
    log_dir: str = ""
    signal_seconds: int = 120
    further_options: list[str] = field(default_factory=list)
    environment: str = ""
    container: str = ""
    mounts: str = ""
    max_restarts: int = 3


def batch_script(job: Job) -> str:
    """The text of the script: our own `#SBATCH` lines and settings, then the launcher's unchanged lines.

    Raises:
        UserError: a value that no `#SBATCH` line can hold.
    """
    for key, folder in (("--log-dir", job.log_dir), ("the working folder", str(job.work_dir))):
        if set(folder) & set("%\\"):
            raise UserError(
                f"{key} {folder!r}: % and \\ in the path of a log are patterns to SLURM; use another folder"
            )
    options = {
        "--job-name": ("--job-name", job.job_name),
        "--nodes": ("--nodes", str(job.nodes)),
        "--ntasks-per-node": ("--tasks-per-node", str(job.tasks_per_node)),
        "--gpus-per-node": ("--gpus-per-node", str(job.gpus_per_node or "")),
        "--partition": ("--partition", job.partition),
        "--account": ("--account", job.account),
        "--time": ("--time", job.time),
        "--chdir": ("the working folder", str(job.work_dir)),
        "--output": ("--log-dir", str(Path(job.log_dir) / "opd-ds-%j.log")),
        "--open-mode": ("", "append"),
        "--signal": ("--signal-seconds", f"B:USR1@{job.signal_seconds}"),
    }
    lines = [f"#SBATCH {name}={_directive_value(*value)}" for name, value in options.items() if value[1]]
    lines.append("#SBATCH --requeue")
    for option in job.further_options:
        name, equals, value = option.partition("=")
        if not re.fullmatch(r"--[a-z][a-z-]*", name):
            raise UserError(f"--sbatch {option!r}: expected one long option of sbatch, for example --sbatch=--qos=long")
        lines.append(f"#SBATCH {name}" + (f"={_directive_value(f'--sbatch {name}', value)}" if equals else ""))
    settings = {
        "ENVIRONMENT": job.environment,
        "CONTAINER": job.container,
        "MOUNTS": job.mounts,
        "MAX_RESTARTS": str(job.max_restarts),
    }
    lines += [""] + [f"{name}={shell_word(value)}" for name, value in settings.items()]
    lines += ["set -- " + " ".join(shell_word(argument) for argument in job.train_arguments), ""]
    launcher = (package_root() / "launchers" / "slurm_train.sbatch").read_text(encoding="utf-8")
    return FIRST_LINES + "\n".join(lines) + "\n" + launcher.partition(_SETTINGS_END)[2]


def shell_word(text: str) -> str:
    """`text` as one word for bash on one line: sbatch refuses scripts with DOS line ends, even inside quotes."""
    if text.isprintable():
        return shlex.quote(text)
    octal = "".join(f"\\{byte:03o}" for byte in text.encode("utf-8", "surrogateescape"))
    return f"$'{octal}'"


def _directive_value(key: str, value: str) -> str:
    """Quote for an `#SBATCH` line: sbatch knows double quotes and backslashes, and expands nothing."""
    if any(unicodedata.category(character).startswith("C") for character in value):
        raise UserError(f"{key} {value!r}: no #SBATCH line holds control characters (line ends, tabs); remove them")
    if re.fullmatch(r"[\w@%+=:,./-]+", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def submit(script: Path) -> str:
    """Hand a batch script to sbatch; the job's id.

    Raises:
        UserError: there is no sbatch here, or it refuses the job.
    """
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script.absolute())], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("--submit: no sbatch on PATH; submit the script on a login node of the cluster") from error
    if done.returncode:
        reason = " ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.split("\n") if line)
        raise UserError(f"--submit: sbatch refuses {script}: {reason}")
    return done.stdout.strip().partition(";")[0]  # "id;cluster" where there are several clusters
