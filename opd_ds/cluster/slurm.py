"""A SLURM batch script for one run, written from `launchers/slurm_train.sbatch`; and handing it to sbatch."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from opd_ds.config.paths import package_root
from opd_ds.errors import UserError

_FIRST_LINE = "#!/usr/bin/env bash\n"
_WRITTEN_BY = "# Written by `opd-ds launch`, which writes over this file only while it is as it was written: "
_SETTINGS_END = "# ---- Nothing below needs editing ----\n"


@dataclass(frozen=True)
class Job:
    """What the batch script is made of; an empty string leaves an option to SLURM's own default."""

    train_arguments: list[str]
    work_dir: Path
    launcher: str = "srun"
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    memory: str = ""
    partition: str = ""
    account: str = ""
    time: str = ""
    job_name: str = "opd-ds"
    log_dir: str = ""
    signal_seconds: int = 600
    further_options: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    prologue: str = ""
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
        "--cpus-per-task": ("--cpus-per-task", str(job.cpus_per_task or "")),
        "--mem": ("--memory", job.memory),
        "--partition": ("--partition", job.partition),
        "--account": ("--account", job.account),
        "--time": ("--time", job.time),
        "--chdir": ("the working folder", str(job.work_dir)),
        "--output": ("--log-dir", str(Path(job.log_dir) / "opd-ds-%j.log")),
        "--open-mode": ("", "append"),
        "--signal": ("--signal-seconds", f"B:USR1@{job.signal_seconds}"),
        "--export": ("", "NONE"),
    }
    lines = [f"#SBATCH {name}={_directive_value(*value)}" for name, value in options.items() if value[1]]
    lines.append("#SBATCH --requeue")
    for option in job.further_options:
        name, equals, value = option.partition("=")
        if not re.fullmatch(r"--[a-z][a-z-]*", name):
            raise UserError(f"--sbatch {option!r}: expected one long option of sbatch, for example --sbatch=--qos=long")
        lines.append(f"#SBATCH {name}" + (f"={_directive_value(f'--sbatch {name}', value)}" if equals else ""))
    settings = {
        "LAUNCHER": job.launcher,
        "PROLOGUE": job.prologue,
        "ENVIRONMENT": job.environment,
        "CONTAINER": job.container,
        "MOUNTS": job.mounts,
        "MAX_RESTARTS": str(job.max_restarts),
    }
    lines += ["", "# The job starts from a login environment: no other variable of the submitting shell reaches it."]
    lines += [f"export {name}={shell_word(value)}" for name, value in job.variables.items()]
    lines += [f"{name}={shell_word(value)}" for name, value in settings.items()]
    lines += ["set -- " + " ".join(shell_word(argument) for argument in job.train_arguments), ""]
    launcher = (package_root() / "launchers" / "slurm_train.sbatch").read_text(encoding="utf-8")
    text = "\n".join(lines) + "\n" + launcher.partition(_SETTINGS_END)[2]
    return f"{_FIRST_LINE}{_WRITTEN_BY}{_digest(text)}\n{text}"


def write_script(script: Path, text: str, log_dir: str = "") -> None:
    """Write what `batch_script` gave, over an earlier one too, and make the folder of the job's output.

    Raises:
        UserError: somebody else has written what is there, or edited it; or it cannot be written.
    """
    try:
        if script.exists():
            _refuse_edited(script, script.read_text(encoding="utf-8", errors="replace"))
        script.write_text(text, encoding="utf-8")
        script.chmod(0o755)
    except OSError as error:
        raise UserError(f"--script {str(script)!r}: cannot be written: {error.strerror}; give another file") from error
    try:
        Path(log_dir).mkdir(parents=True, exist_ok=True)  # without it SLURM loses the job's output in silence
    except OSError as error:
        raise UserError(f"--log-dir {log_dir!r}: cannot be made: {error.strerror}; give another folder") from error


def _refuse_edited(script: Path, there: str) -> None:
    head, ours, rest = there.partition(_WRITTEN_BY)
    digest, _, text = rest.partition("\n")
    if head != _FIRST_LINE or not ours:
        raise UserError(f"--script {str(script)!r}: exists and `opd-ds launch` did not write it; give another name")
    if digest != _digest(text):
        raise UserError(
            f"--script {str(script)!r}: was edited since `opd-ds launch` wrote it, and is kept; submit it as it is "
            f"(sbatch {shlex.quote(str(script))}), give another name, or remove it"
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def limit_seconds(time: str) -> int | None:
    """Of a time limit in SLURM's forms (minutes, [days-]hours:minutes:seconds and what lies between); None: no limit.

    Raises:
        UserError: in none of these forms.
    """
    if time.lower() in ("unlimited", "infinite"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise UserError(f"--time {time!r}: expected minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, for example 24:00:00")
    days, first, second, third = (int(part) if part is not None else None for part in match.groups())
    if days is not None:  # days-hours[:minutes[:seconds]]
        return days * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return (first or 0) * 3600 + (second or 0) * 60 + third
    return (first or 0) * 60 + (second or 0)


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
    environment = {name: value for name, value in os.environ.items() if not _outranks(name, script)}
    command = ["sbatch", "--parsable", str(script.absolute())]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("--submit: no sbatch on PATH; submit the script on a login node of the cluster") from error
    if done.returncode:
        reason = " ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.split("\n") if line)
        raise UserError(f"--submit: sbatch refuses {script}: {reason}")
    return done.stdout.strip().partition(";")[0]  # "id;cluster" where there are several clusters


def _outranks(variable: str, script: Path) -> bool:
    """Whether sbatch would take a variable for more than the script's own line: `SBATCH_PARTITION`, say; and what a job
    around this shell has set, which --export=NONE lets through.
    """
    if variable.startswith("SLURM_"):
        return variable != "SLURM_CONF"
    names = re.findall(r"^#SBATCH --([a-z-]+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    options = {"timelimit" if name == "time" else name for name in names}
    return variable in {f"SBATCH_{name.replace('-', '_').upper()}" for name in options}
