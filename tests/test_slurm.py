"""Batch scripts: what a user gives arrives as it is, or is refused; the launchers' decisions with a stub for SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from opd_ds.cli.launch import launch
from opd_ds.cluster import slurm
from opd_ds.cluster.slurm import Job, batch_script, shell_word
from opd_ds.config.paths import package_root
from opd_ds.errors import UserError

EVIL = [
    "a b",
    "it's",
    'say "x"',
    "$(touch owned)",
    "`touch owned`",
    "a;touch owned",
    "two\nlines",
    "dos\r\nlines\t",
    "back\\slash\\",
    "'; touch owned; '",
    "!history $HOME ~ * ? [a] {b,c} # %h %n %j",
    "Übergröße 漢字 \u200b",
    "-n",
    "",
]


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.chdir(tmp_path)
    application = typer.Typer()
    application.command()(launch)
    return application


def invoke(app: typer.Typer, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["--slurm", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def arguments_of(script: str, folder: Path) -> list[str]:
    """The words of the script's `set --`, read back by bash."""
    top = script.partition("set -eo pipefail")[0] + "printf '%s\\0' \"$@\""
    done = subprocess.run(["bash", "-c", top], cwd=folder, capture_output=True, check=True)
    assert not (folder / "owned").exists()
    return [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]


@pytest.mark.parametrize("value", EVIL)
def test_a_word_is_one_line_and_bash_reads_it_back(value: str, tmp_path: Path) -> None:
    assert not set("\n\r") & set(shell_word(value))
    done = subprocess.run(["bash", "-c", f"printf %s {shell_word(value)}"], cwd=tmp_path, capture_output=True)
    assert os.fsdecode(done.stdout) == value
    assert list(tmp_path.iterdir()) == []


def test_every_value_reaches_train_as_it_was_given(app: typer.Typer, tmp_path: Path) -> None:
    settings = [word for value in EVIL for word in ("--set", f"run.output_dir='{value.replace(chr(39), chr(39) * 2)}'")]
    script = invoke(app, "--dry-run", "--recipe", "miniature", *settings)
    assert arguments_of(script, tmp_path) == ["--recipe", "miniature", *settings]


@pytest.mark.parametrize("name", ["a b.yaml", "$(touch owned).yaml", "it's; touch owned.yaml", "two\nlines.yaml"])
def test_config_files_with_evil_names(name: str, app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text((package_root() / "recipes" / "miniature.yaml").read_text())
    script = invoke(app, "--dry-run", "--config", name)
    assert arguments_of(script, tmp_path) == ["--config", str(file)]
    script = invoke(app, "--dry-run", "--recipe", "miniature", "--config", name)
    assert arguments_of(script, tmp_path) == ["--recipe", "miniature", "--config", str(file)]


def test_settings_are_quoted(tmp_path: Path) -> None:
    evil = "x'$(touch owned)"
    script = batch_script(Job([], tmp_path, environment=evil, container=evil, mounts=evil))
    top = script.partition("set -eo pipefail")[0] + 'printf "%s\\n" "$ENVIRONMENT" "$CONTAINER" "$MOUNTS"'
    done = subprocess.run(["bash", "-c", top], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [evil] * 3
    assert list(tmp_path.iterdir()) == []


def test_directives(app: typer.Typer, tmp_path: Path) -> None:
    script = invoke(
        app, "--dry-run", "--recipe", "miniature", "--nodes", "4", "--gpus-per-node", "8", "--partition", "gpu,long",
        "--account", 'my "own" \\ account', "--time", "1-00:00:00", "--job-name", "$(touch owned);",
        "--log-dir", "logs", "--signal-seconds", "300", "--sbatch=--qos=a b", "--sbatch=--exclusive",
        "--max-restarts", "5",
    )  # fmt: skip
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert lines == [
        '--job-name="$(touch owned);"',
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--partition=gpu,long",
        '--account="my \\"own\\" \\\\ account"',
        "--time=1-00:00:00",
        f"--chdir={tmp_path}",
        "--output=logs/opd-ds-%j.log",
        "--open-mode=append",
        "--signal=B:USR1@300",
        "--requeue",
        '--qos="a b"',
        "--exclusive",
    ]
    assert "MAX_RESTARTS=5\n" in script
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--partition", "a\n#SBATCH --account=b"], "--partition 'a\\n#SBATCH --account=b': no #SBATCH line holds"),
        (["--job-name", "a\tb"], "--job-name 'a\\tb': no #SBATCH line holds control characters"),
        (["--log-dir", "a%jb"], "--log-dir 'a%jb': % and \\ in the path"),
        (["--sbatch=-p x"], "--sbatch '-p x': expected one long option"),
        (["--sbatch=--qos=a\nb"], "--sbatch --qos 'a\\nb': no #SBATCH line"),
        (["--gpus-per-node", "8", "--tasks-per-node", "2"], "--tasks-per-node 2: a run has one task per GPU, here 8"),
        (["--set", "rollout.stepz=3"], "rollout.stepz = 3: unknown key"),
        (["--submit"], "--submit: no sbatch on PATH"),
    ],
)
def test_refusals(arguments: list[str], message: str, app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError) as refusal:
        invoke(app, "--recipe", "miniature", *arguments)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


def test_a_working_folder_that_slurm_cannot_write_to(app: typer.Typer, tmp_path: Path) -> None:
    for name in ("50%", "back\\slash"):
        with pytest.raises(UserError, match=r"the working folder .* use another folder"):
            batch_script(Job([], tmp_path / name))


def test_nothing_of_the_users_is_overwritten(app: typer.Typer, tmp_path: Path) -> None:
    theirs = tmp_path / "job.sbatch"
    theirs.write_text("mine")
    with pytest.raises(UserError, match=r"job\.sbatch': exists and"):
        invoke(app, "--recipe", "miniature", "--script", "job.sbatch")
    assert theirs.read_text() == "mine"
    for rounds in ("3", "4"):  # ours may be
        said = invoke(app, "--recipe", "miniature", "--script", "a b.sbatch", "--set", f"run.rounds={rounds}")
        assert said == "wrote a b.sbatch; submit it with: sbatch 'a b.sbatch'\n"
        assert f"run.rounds={rounds}" in (tmp_path / "a b.sbatch").read_text()


def test_submission(app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path / "bin" / "sbatch", 'printf "%s\\n" "$@" >sbatch.arguments; echo "12;cluster"')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    assert invoke(app, "--recipe", "miniature", "--submit", "--script", "-x $(y).sbatch", "--log-dir", "a/b") == "12\n"
    assert (tmp_path / "sbatch.arguments").read_text() == f"--parsable\n{tmp_path}/-x $(y).sbatch\n"
    assert (tmp_path / "a" / "b").is_dir()
    stub(tmp_path / "bin" / "sbatch", 'echo "sbatch: error: invalid partition" >&2; exit 1')
    with pytest.raises(UserError, match=r"sbatch refuses opd-ds\.sbatch: invalid partition"):
        invoke(app, "--recipe", "miniature", "--submit")


def test_what_the_two_batch_scripts_share_is_the_same() -> None:
    def shared(name: str) -> str:
        return (package_root() / "launchers" / name).read_text().partition("neighbours.\n")[2].partition("# ----\n")[0]

    assert shared("slurm_train.sbatch") == shared("slurm_deepspeed.sbatch") != ""
    assert slurm._SETTINGS_END in (package_root() / "launchers" / "slurm_train.sbatch").read_text()


def stub(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


@pytest.fixture
def run_batch(tmp_path: Path) -> Any:
    """Run a batch script without SLURM: what srun was called with, what was said, the exit code."""
    (tmp_path / "work").mkdir()
    programs = tmp_path / "bin"
    port = '[[ " $* " = *" opd_ds.cluster.rendezvous "* ]] && echo 1234'
    progress = '[ -z "$PROGRESS" ] || rm -f "$OPD_DS_RESTARTS_FILE"'
    stub(programs / "srun", f'printf "%s\\0" "$@" >>"$RECORD"; {port}; {progress}; exit $CODE')
    stub(programs / "squeue", "echo ${STATE:-RUNNING}")
    stub(programs / "scontrol", '[ $1 = show ] && echo first || echo "scontrol $*"')
    stub(programs / "opd-ds", "")
    stub(programs / "apptainer", "echo 1234")

    def run(script: str, *arguments: str, code: int = 0, **environment: str) -> tuple[list[str], str, int]:
        record = tmp_path / "record"
        record.write_bytes(b"")
        done = subprocess.run(
            ["bash", "-c", script, "batch", *arguments],
            env={
                "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "n[1-2]",
                "SLURM_JOB_NUM_NODES": "2",
                "MASTER_PORT": "29517",
                "RECORD": str(record),
                "CODE": str(code),
            }
            | environment,
            cwd=tmp_path / "work",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
        )
        return record.read_text().split("\0")[:-1], done.stdout, done.returncode

    return run


TRAIN = ["bash", "-c", 'trap "" TERM; exec opd-ds train --resume auto "$@"', "bash"]
REQUEUED = "scontrol requeue 7"


@pytest.mark.parametrize("name", ["slurm_train.sbatch", "slurm_deepspeed.sbatch"])
def test_which_exit_codes_go_back_into_the_queue(name: str, run_batch: Any, tmp_path: Path) -> None:
    """A saved state is progress, and forgets the losses counted before."""
    script = (package_root() / "launchers" / name).read_text()
    losses = tmp_path / "work" / ".opd-ds-losses-7"
    for code, before, state, requeued, after in [
        (0, 2, "RUNNING", False, None),
        (1, 0, "RUNNING", False, None),
        (2, 2, "RUNNING", False, None),
        (75, 0, "RUNNING", True, None),
        (75, 3, "RUNNING", True, None),
        (75, 0, "CANCELLED", False, None),
        (143, 3, "RUNNING", True, None),
        (143, 0, "COMPLETING", False, None),
        (76, 0, "RUNNING", True, 1),
        (76, 2, "RUNNING", True, 3),
        (76, 3, "RUNNING", False, None),
        (137, 0, "RUNNING", True, 1),
        (137, 3, "RUNNING", False, None),
        (137, 0, "COMPLETING", False, 1),
        (247, 1, "RUNNING", True, 2),
    ]:
        losses.unlink(missing_ok=True)
        if before:
            losses.write_text(f"{before}\n")
        _, said, exit_code = run_batch(script, code=code, STATE=state)
        assert exit_code == code
        assert (REQUEUED in said) == requeued, (code, before, state, said)
        assert ("was lost" in said) == (code in (76, 137, 247))
        assert (int(losses.read_text()) if losses.exists() else None) == after
    losses.write_text("3\n")
    _, said, _ = run_batch(script, code=76, PROGRESS="a checkpoint")
    assert REQUEUED in said
    assert losses.read_text() == "1\n"


def test_containers(run_batch: Any, tmp_path: Path) -> None:
    work = str(tmp_path / "work")
    train = [*TRAIN, "--recipe", "it's"]

    def script(container: str) -> str:
        return batch_script(Job(["--recipe", "it's"], tmp_path, container=container, mounts="/data:/data"))

    called, _, _ = run_batch(script("my image.sif"), SLURM_GPUS_ON_NODE="8")
    bind = ["--nv", "--bind", f"{work}:{work},/data:/data"]
    assert called == ["--kill-on-bad-exit=1", "apptainer", "exec", *bind, "my image.sif", *train]

    image = "nvcr.io#nvidia/pytorch:25.08"
    mounts = f"--container-mounts={work}:{work},/data:/data"
    step = [f"--container-image={image}", f"--container-workdir={work}", mounts]
    called, _, _ = run_batch(script(image))
    assert called == ["--kill-on-bad-exit=1", *step, *train]
    deepspeed = (package_root() / "launchers" / "slurm_deepspeed.sbatch").read_text()
    called, _, _ = run_batch(deepspeed.replace("CONTAINER= ", f"CONTAINER={image} "), MASTER_PORT="")
    asked = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", *step[:2], mounts.partition(",")[0]]
    assert called[:9] == [*asked, "python", "-m", "opd_ds.cluster.rendezvous"]


def test_the_environment_of_a_batch_job(run_batch: Any, tmp_path: Path) -> None:
    script = (package_root() / "launchers" / "slurm_train.sbatch").read_text()
    bare = {"PATH": "/usr/bin:/bin"}
    _, said, code = run_batch(script, **bare)
    assert code == 2
    assert "opd-ds is not on PATH; set ENVIRONMENT" in said
    activate = tmp_path / "work" / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"PATH={tmp_path}/bin:$PATH\n")
    called, _, code = run_batch(script, "--recipe", "miniature", **bare)
    assert (called[1:], code) == ([*TRAIN, "--recipe", "miniature"], 0)


def test_a_batch_script_is_for_sbatch(run_batch: Any) -> None:
    _, said, code = run_batch((package_root() / "launchers" / "slurm_train.sbatch").read_text(), SLURM_JOB_ID="")
    assert code != 0
    assert "submit this file with sbatch" in said
