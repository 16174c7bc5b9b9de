"""`opd-ds launch`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from opd_ds.cluster.slurm import FIRST_LINES, Job, batch_script, submit
from opd_ds.config.loading import load_config
from opd_ds.errors import UserError


def _write(script: Path, text: str) -> None:
    try:
        if script.exists() and not script.read_text(encoding="utf-8", errors="replace").startswith(FIRST_LINES):
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
    source = ["--recipe", recipe] if recipe is not None else []
    source += ["--config", str(config.absolute())] if config is not None else []
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
