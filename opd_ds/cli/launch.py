"""`opd-ds launch`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from opd_ds.cli.train import Config, Overrides, Recipe
from opd_ds.cluster.job_defaults import active_environment, passed_variables, prologue_file, signal_time
from opd_ds.cluster.mounts import mounts_of
from opd_ds.cluster.slurm import Job, batch_script, submit, write_script
from opd_ds.config.loading import load_config
from opd_ds.errors import UserError

_SIGNAL_HELP = (
    "how long before the limit the state is saved and the job requeued; default: two rounds and a checkpoint, as "
    "planned with --gpu or measured in run.output_dir, at least 600"
)


def launch(
    slurm: Annotated[bool, typer.Option("--slurm", help="as a SLURM job")] = False,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="one task each; 0: a run on CPUs")] = 0,
    tasks_per_node: Annotated[int | None, typer.Option(min=1, help="for a run on CPUs, default 1")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="default: 8 with GPUs, else SLURM's")] = None,
    mem: Annotated[str, typer.Option(help="of a node, as 200G; default: as planned with --gpu, else SLURM's")] = "",
    gpu: Annotated[str, typer.Option(help="kind, as H100-80GB: plan memory and signal time for it (a minute)")] = "",
    launcher: Annotated[Literal["srun", "deepspeed"], typer.Option(help="what starts the processes")] = "srun",
    partition: Annotated[str, typer.Option()] = "",
    account: Annotated[str, typer.Option()] = "",
    time: Annotated[str, typer.Option(help="limit, for example 24:00:00")] = "",
    job_name: Annotated[str, typer.Option()] = "opd-ds",
    log_dir: Annotated[str, typer.Option(help="folder of the job's output, opd-ds-<job id>.log; default: here")] = "",
    signal_seconds: Annotated[int | None, typer.Option(min=1, max=65535, help=_SIGNAL_HELP)] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="another option of sbatch, as --sbatch=--qos=long")] = None,
    prologue: Annotated[
        Path | None, typer.Option(help="what the job sources first: modules, conda, NCCL_, HF_")
    ] = None,
    container: Annotated[str, typer.Option(help="image with opd-ds: NAME.sif for apptainer, else pyxis")] = "",
    mounts: Annotated[str, typer.Option(help="SRC:DST,... besides this folder and what the config names")] = "",
    max_restarts: Annotated[int, typer.Option(min=0, help="after the loss of a rank or a node")] = 3,
    script: Annotated[Path, typer.Option(help="where the batch script is written")] = Path("opd-ds.sbatch"),
    submit_it: Annotated[bool, typer.Option("--submit", help="and hand it to sbatch; prints the job's id")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the script; write and submit nothing")] = False,
    recipe: Recipe = None,
    config: Config = None,
    overrides: Overrides = None,
    allow_change: Annotated[list[str] | None, typer.Option(help="as for `opd-ds train`, repeatable")] = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="leave out the checks of --dry-run: files or servers are elsewhere")
    ] = False,
) -> None:
    """Write, and submit, the batch script of a run that survives its time limit and lost nodes."""
    if not slurm:
        raise UserError("launch: say --slurm; for other ways to start see launchers/")
    tasks = tasks_per_node or gpus_per_node or 1
    if gpus_per_node not in (0, tasks):
        raise UserError(f"--tasks-per-node {tasks}: a run has one task per GPU, here {gpus_per_node}; leave it out")
    settings = load_config(recipe, config, overrides or [])  # better said now than after a night in the queue
    if not (dry_run or unchecked):
        from opd_ds.cli.dry_run import check_start

        check_start(settings, nodes, tasks, allow_change or [])
    saving, variables = 0.0, passed_variables()
    if gpu:
        from opd_ds.plan.job import job_needs

        needs = job_needs(settings, gpu, nodes, tasks)
        saving, mem = needs.saving, mem or f"{needs.memory}G"
    if container:
        named = mounts_of([settings.model_dump(), list(variables.values()), config or []], Path.cwd())
        mounts = ",".join(part for part in (named, mounts) if part)
    source = ["--recipe", recipe] if recipe is not None else []
    source += ["--config", str(config.absolute())] if config is not None else []
    text = batch_script(
        Job(
            train_arguments=source
            + [word for override in overrides or [] for word in ("--set", override)]
            + [word for key in allow_change or [] for word in ("--allow-change", key)],
            work_dir=Path.cwd(),
            launcher=launcher,
            nodes=nodes,
            tasks_per_node=tasks,
            gpus_per_node=gpus_per_node,
            cpus_per_task=cpus_per_task or (8 if gpus_per_node else None),
            memory=mem,
            partition=partition,
            account=account,
            time=time,
            job_name=job_name,
            log_dir=log_dir,
            signal_seconds=signal_time(signal_seconds, saving, settings.run.output_dir, time),
            further_options=sbatch or [],
            variables=variables,
            prologue=prologue_file(prologue),
            environment="" if container else active_environment(),
            container=container,
            mounts=mounts,
            max_restarts=max_restarts,
        )
    )
    if dry_run:
        typer.echo(text, nl=False)
        return
    write_script(script, text, log_dir)
    if submit_it:
        typer.echo(submit(script))
    else:
        typer.echo(f"wrote {script}; submit it with: sbatch {shlex.quote(str(script))}")
