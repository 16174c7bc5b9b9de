"""`opd-ds launch`: a SLURM batch script for one run, written from `launchers/slurm_train.sbatch`."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from opd_ds.errors import UserError
from opd_ds.loading import load_config, package_root

_FIRST_LINES = "#!/usr/bin/env bash\n# Written by `opd-ds launch`; `opd-ds launch` may overwrite it.\n"
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
    return _FIRST_LINES + "\n".join(lines) + "\n" + launcher.partition(_SETTINGS_END)[2]


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


def _write(script: Path, text: str) -> None:
    try:
        if script.exists() and not script.read_text(encoding="utf-8", errors="replace").startswith(_FIRST_LINES):
            raise UserError(f"--script {str(script)!r}: exists and `opd-ds launch` did not write it; give another name")
        script.write_text(text, encoding="utf-8")
        script.chmod(0o755)
    except OSError as error:
        raise UserError(f"--script {str(script)!r}: cannot be written: {error.strerror}; give another file") from error


def _make_folder(log_dir: str) -> None:
    try:
        Path(log_dir).mkdir(parents=True, exist_ok=True)  # without it SLURM loses the job's output in silence
    except OSError as error:
        raise UserError(f"--log-dir {log_dir!r}: cannot be made: {error.strerror}; give another folder") from error


def _active_environment() -> str:
    activate = Path(sys.prefix) / "bin" / "activate"
    return str(activate) if sys.prefix != sys.base_prefix and activate.is_file() else ""


def launch(
    slurm: Annotated[bool, typer.Option("--slurm", help="as a SLURM job")] = False,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="one task each; 0: a run on CPUs")] = 0,
    tasks_per_node: Annotated[int | None, typer.Option(min=1, help="for a run on CPUs, default 1")] = None,
    partition: Annotated[str, typer.Option()] = "",
    account: Annotated[str, typer.Option()] = "",
    time: Annotated[str, typer.Option(help="limit, for example 24:00:00")] = "",
    job_name: Annotated[str, typer.Option()] = "opd-ds",
    log_dir: Annotated[str, typer.Option(help="folder of the job's output, opd-ds-<job id>.log; default: here")] = "",
    signal_seconds: Annotated[
        int, typer.Option(min=1, max=65535, help="how long before the limit the state is saved and the job requeued")
    ] = 120,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="any other option of sbatch, repeatable: --sbatch=--qos=long")
    ] = None,
    container: Annotated[str, typer.Option(help="image with opd-ds: NAME.sif for apptainer, else pyxis")] = "",
    mounts: Annotated[str, typer.Option(help="SRC:DST,... for the container, besides this folder")] = "",
    max_restarts: Annotated[int, typer.Option(min=0, help="after the loss of a rank or a node")] = 3,
    script: Annotated[Path, typer.Option(help="where the batch script is written")] = Path("opd-ds.sbatch"),
    submit_it: Annotated[bool, typer.Option("--submit", help="and hand it to sbatch; prints the job's id")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the script; write and submit nothing")] = False,
    recipe: Annotated[str | None, typer.Option(help="a shipped recipe, see `opd-ds recipes`")] = None,
    config: Annotated[Path | None, typer.Option(help="your own YAML run config")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, repeatable")] = None,
) -> None:
    """Write, and submit, the batch script of a run that survives its time limit and lost nodes."""
    if not slurm:
        raise UserError("launch: say --slurm; for other ways to start see launchers/")
    tasks = tasks_per_node or gpus_per_node or 1
    if gpus_per_node not in (0, tasks):
        raise UserError(f"--tasks-per-node {tasks}: a run has one task per GPU, here {gpus_per_node}; leave it out")
    load_config(recipe, config, overrides or [])  # better said now than after a night in the queue
    source = ["--recipe", recipe] if recipe is not None else ["--config", str(Path(config or "").absolute())]
    text = batch_script(
        Job(
            train_arguments=source + [word for override in overrides or [] for word in ("--set", override)],
            work_dir=Path.cwd(),
            nodes=nodes,
            tasks_per_node=tasks,
            gpus_per_node=gpus_per_node,
            partition=partition,
            account=account,
            time=time,
            job_name=job_name,
            log_dir=log_dir,
            signal_seconds=signal_seconds,
            further_options=sbatch or [],
            environment="" if container else _active_environment(),
            container=container,
            mounts=mounts,
            max_restarts=max_restarts,
        )
    )
    if dry_run:
        typer.echo(text, nl=False)
        return
    _write(script, text)
    _make_folder(log_dir)
    if submit_it:
        typer.echo(submit(script))
    else:
        typer.echo(f"wrote {script}; submit it with: sbatch {shlex.quote(str(script))}")
