"""Batch scripts: what a user gives arrives as it is, or is refused; the launchers' decisions with a stub for SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from opd_ds.cli.launch import launch
from opd_ds.cluster.job_defaults import active_environment, passed_variables, signal_time
from opd_ds.cluster.mounts import mounts_of
from opd_ds.cluster.slurm import Job, batch_script, limit_seconds, shell_word
from opd_ds.config.paths import package_root
from opd_ds.errors import UserError
from opd_ds.plan import job

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
    values = {"prologue": evil, "environment": evil, "container": evil, "mounts": evil}
    script = batch_script(Job([], tmp_path, variables={"HF_HOME": evil}, **values))
    names = " ".join(f'"${name}"' for name in ("HF_HOME", "PROLOGUE", "ENVIRONMENT", "CONTAINER", "MOUNTS"))
    top = script.partition("set -eo pipefail")[0] + f'printf "%s\\n" {names}'
    done = subprocess.run(["bash", "-c", top], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [evil] * 5
    assert list(tmp_path.iterdir()) == []


def test_directives(app: typer.Typer, tmp_path: Path) -> None:
    script = invoke(
        app, "--dry-run", "--recipe", "miniature", "--nodes", "4", "--gpus-per-node", "8", "--partition", "gpu,long",
        "--account", 'my "own" \\ account', "--time", "1-00:00:00", "--job-name", "$(touch owned);",
        "--log-dir", "logs", "--signal-seconds", "300", "--sbatch=--qos=a b", "--sbatch=--exclusive",
        "--max-restarts", "5", "--cpus-per-task", "12", "--mem", "200G", "--launcher", "deepspeed",
    )  # fmt: skip
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert lines == [
        '--job-name="$(touch owned);"',
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=12",
        "--mem=200G",
        "--partition=gpu,long",
        '--account="my \\"own\\" \\\\ account"',
        "--time=1-00:00:00",
        f"--chdir={tmp_path}",
        "--output=logs/opd-ds-%j.log",
        "--open-mode=append",
        "--signal=B:USR1@300",
        "--export=NONE",
        "--requeue",
        '--qos="a b"',
        "--exclusive",
    ]
    assert "MAX_RESTARTS=5\n" in script
    assert "LAUNCHER=deepspeed\n" in script
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
        (["--prologue", "gone.sh"], "--prologue 'gone.sh': no such file"),
        (["--time", "1d"], "--time '1d': expected minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS"),
        (["--time", "10"], "--time 10: the job would be told to save 600 s before that"),
        (["--gpu", "H100"], "--gpu = '1xH100': unknown kind 'H100'"),
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
    ours = tmp_path / "a b.sbatch"
    for rounds in ("3", "4"):  # ours may be
        said = invoke(app, "--recipe", "miniature", "--script", "a b.sbatch", "--set", f"run.rounds={rounds}")
        assert said == "wrote a b.sbatch; submit it with: sbatch 'a b.sbatch'\n"
        assert f"run.rounds={rounds}" in ours.read_text()
    edited = ours.read_text().replace("--nodes=1", "--nodes=2")
    ours.write_text(edited)
    with pytest.raises(UserError, match=r"was edited since `opd-ds launch` wrote it, and is kept; .* \(sbatch 'a b"):
        invoke(app, "--recipe", "miniature", "--script", "a b.sbatch")
    assert ours.read_text() == edited


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-12", 216000), ("1-00:30", 88200), ("1-0:0:5", 86405)],
)
def test_time_limits_in_all_of_slurms_forms(time: str, seconds: int) -> None:
    assert limit_seconds(time) == seconds
    assert limit_seconds("UNLIMITED") is None


def test_there_is_time_for_two_rounds_and_a_checkpoint(app: typer.Typer, tmp_path: Path) -> None:
    """As the run itself took, else as planned, else ten minutes."""

    def signal(*arguments: str) -> str:
        script = invoke(app, "--dry-run", "--recipe", "miniature", "--set", "run.output_dir=out", *arguments)
        return next(line.partition("@")[2] for line in script.splitlines() if line.startswith("#SBATCH --signal"))

    assert signal() == "600"
    (tmp_path / "out").mkdir()
    rows = [{"round": 1, "seconds/rollout": 500, "seconds/train": 700.5}, {"round": 2, "seconds/rollout": 400}]
    (tmp_path / "out" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"round"')
    assert signal() == "2401"
    assert signal("--signal-seconds", "60", "--time", "2") == "60"
    assert signal_time(None, 5000.4, tmp_path, "") == 5000


def test_a_plan_says_how_much_memory_and_time_a_job_needs(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []

    def planned(config: object, gpu: str, nodes: int, per_node: int) -> job.Needs:
        asked.append((gpu, nodes, per_node))
        return job.Needs(memory=321, saving=1234.5)

    monkeypatch.setattr(job, "job_needs", planned)
    arguments = ("--dry-run", "--recipe", "miniature", "--nodes", "2", "--gpus-per-node", "4", "--gpu", "H100-80GB")
    script = invoke(app, *arguments)
    assert asked == [("H100-80GB", 2, 4)]
    assert "#SBATCH --mem=321G\n" in script
    assert "#SBATCH --signal=B:USR1@1234\n" in script
    assert "#SBATCH --cpus-per-task=8\n" in script
    assert "#SBATCH --mem=9G\n" in invoke(app, *arguments, "--mem", "9G")


def test_what_a_job_gets_of_this_shell(app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that is active here, and where things are; no rank, no secret."""
    for name in ("HF_HOME", "OPD_DS_WEIGHTS", "RANK", "HF_TOKEN", "NCCL_DEBUG"):
        monkeypatch.setenv(name, f"my {name}")
    (tmp_path / "setup.sh").write_text("")
    script = invoke(app, "--dry-run", "--recipe", "miniature", "--prologue", "setup.sh")
    exported = [line for line in script.splitlines() if line.startswith("export ")]
    assert {"export HF_HOME='my HF_HOME'", "export OPD_DS_WEIGHTS='my OPD_DS_WEIGHTS'"} <= set(exported)
    assert not any(name in script for name in ("my RANK", "my HF_TOKEN", "my NCCL_DEBUG"))
    assert f"PROLOGUE={tmp_path}/setup.sh\n" in script
    for prefix, files, expected in (("venv", ["activate", "opd-ds"], "bin/activate"), ("conda", ["opd-ds"], "")):
        (tmp_path / prefix / "bin").mkdir(parents=True)
        for file in files:
            (tmp_path / prefix / "bin" / file).touch()
        monkeypatch.setattr(sys, "prefix", str(tmp_path / prefix))
        assert active_environment() == str(tmp_path / prefix / expected)


def test_a_container_sees_what_the_config_names(
    app: typer.Typer, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for folder in ("base", "teachers/a", "configs", "real", "hub"):
        (elsewhere / folder).mkdir(parents=True)
    (elsewhere / "teachers" / "a" / "lora.safetensors").touch()
    (elsewhere / "link").symlink_to(elsewhere / "real")
    config = elsewhere / "configs" / "run.yaml"
    recipe = yaml.safe_load((package_root() / "recipes" / "miniature.yaml").read_text())
    recipe["model"]["path"] = str(elsewhere / "base")
    recipe["tasks"]["text"]["teacher"]["path"] = str(elsewhere / "teachers" / "a" / "lora.safetensors")
    recipe["run"]["output_dir"] = str(elsewhere / "link" / "new" / "out")
    config.write_text(yaml.safe_dump(recipe))
    for name in passed_variables():  # torch sets one when it is imported
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(elsewhere / "hub"))
    script = invoke(app, "--dry-run", "--config", str(config), "--container", "x.sif", "--mounts", "/scratch:/scratch")
    (mounts,) = [line for line in script.splitlines() if line.startswith("MOUNTS=")]
    named = [elsewhere / folder for folder in ("base", "configs", "hub", "link", "real", "teachers/a")]
    expected = [*(f"{folder}:{folder}" for folder in named), "/scratch:/scratch"]
    assert mounts.partition("=")[2].split(",") == expected
    (elsewhere / "a:b").mkdir()
    with pytest.raises(UserError, match=r"a:b' has : or , in it, which separate mounts"):
        mounts_of({"path": elsewhere / "a:b"}, tmp_path)


def test_submission(app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path / "bin" / "sbatch", 'printf "%s\\n" "$@" >sbatch.arguments; echo "12;cluster"')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    assert invoke(app, "--recipe", "miniature", "--submit", "--script", "-x $(y).sbatch", "--log-dir", "a/b") == "12\n"
    assert (tmp_path / "sbatch.arguments").read_text() == f"--parsable\n{tmp_path}/-x $(y).sbatch\n"
    assert (tmp_path / "a" / "b").is_dir()
    # The flags count, whatever variables of a shell, or of a job around it, say; what no flag says is left to them.
    stub(tmp_path / "bin" / "sbatch", "env >sbatch.environment; echo 12")
    names = ("SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SBATCH_EXPORT", "SLURM_STEP_ID", "SBATCH_ACCOUNT", "SLURM_CONF")
    for name in names:
        monkeypatch.setenv(name, "theirs")
    invoke(app, "--recipe", "miniature", "--submit", "--partition", "gpu", "--time", "60")
    told = {line.partition("=")[0] for line in (tmp_path / "sbatch.environment").read_text().splitlines()}
    assert told & set(names) == {"SBATCH_ACCOUNT", "SLURM_CONF"}
    stub(tmp_path / "bin" / "sbatch", 'echo "sbatch: error: invalid partition" >&2; exit 1')
    with pytest.raises(UserError, match=r"sbatch refuses opd-ds\.sbatch: invalid partition"):
        invoke(app, "--recipe", "miniature", "--submit")


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
    done = '[ "$CODE" -ne 0 ] || [ -n "$ENDED_EARLY" ] || touch "$PWD/.opd-ds-done-$SLURM_JOB_ID"'
    stub(
        programs / "srun", f'printf "%s\\0" "$@" >>"$RECORD"; env >environment; {port}; {progress}; {done}; exit $CODE'
    )
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


TRAIN = ["bash", "-c", 'trap "" TERM; exec opd-ds "$@"', "bash", "train", "--resume", "auto", "--done-file"]
STEP = ["--kill-on-bad-exit=1", "--export=ALL"]
LAUNCHERS = ("srun", "deepspeed")
REQUEUED = "scontrol requeue 7"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_which_exit_codes_go_back_into_the_queue(launcher: str, run_batch: Any, tmp_path: Path) -> None:
    """A saved state is progress, and forgets the losses counted before."""
    script = (package_root() / "launchers" / "slurm_train.sbatch").read_text()
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
        _, said, exit_code = run_batch(script, code=code, STATE=state, LAUNCHER=launcher)
        assert exit_code == code
        assert (REQUEUED in said) == requeued, (code, before, state, said)
        assert ("was lost" in said) == (code in (76, 137, 247))
        assert (int(losses.read_text()) if losses.exists() else None) == after
    losses.write_text("3\n")
    _, said, _ = run_batch(script, code=76, PROGRESS="a checkpoint")
    assert REQUEUED in said
    assert losses.read_text() == "1\n"
    _, said, exit_code = run_batch(script, code=0, ENDED_EARLY="yes", LAUNCHER=launcher)
    assert "exit code 0, but the run did not say that it is done" in said
    assert (exit_code, losses.read_text()) == (76, "2\n")
    assert not list((tmp_path / "work").glob(".opd-ds-done-*"))


def test_containers(run_batch: Any, tmp_path: Path) -> None:
    work = str(tmp_path / "work")
    train = [*TRAIN, f"{work}/.opd-ds-done-7", "--recipe", "it's"]

    def script(container: str) -> str:
        return batch_script(Job(["--recipe", "it's"], tmp_path, container=container, mounts="/data:/data"))

    called, _, _ = run_batch(script("my image.sif"), SLURM_GPUS_ON_NODE="8")
    bind = ["--nv", "--bind", f"{work}:{work},/data:/data"]
    assert called == [*STEP, "apptainer", "exec", *bind, "my image.sif", *train]

    image = "nvcr.io#nvidia/pytorch:25.08"
    mounts = f"--container-mounts={work}:{work},/data:/data"
    step = [f"--container-image={image}", f"--container-workdir={work}", mounts]
    called, _, _ = run_batch(script(image))
    assert called == [*STEP, *step, *train]
    called, _, _ = run_batch(
        batch_script(Job([], tmp_path, launcher="deepspeed", container=image, mounts="/data:/data"))
    )
    asked = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--export=ALL", *step]
    assert called[:10] == [*asked, "python", "-m", "opd_ds.cluster.rendezvous"]


def test_the_environment_of_a_batch_job(run_batch: Any, tmp_path: Path) -> None:
    script = (package_root() / "launchers" / "slurm_train.sbatch").read_text()
    bare = {"PATH": "/usr/bin:/bin"}
    _, said, code = run_batch(script, **bare)
    assert code == 2
    assert "opd-ds is not on PATH; set PROLOGUE or ENVIRONMENT" in said
    activate = tmp_path / "work" / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"PATH={tmp_path}/bin:$PATH\n")
    called, _, code = run_batch(script, "--recipe", "miniature", **bare)
    done = f"{tmp_path}/work/.opd-ds-done-7"
    assert (called, code) == ([*STEP, *TRAIN, done, "--recipe", "miniature"], 0)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_variables_of_another_launcher_end_in_the_batch_script(launcher: str, run_batch: Any, tmp_path: Path) -> None:
    """A job may be submitted with --export=ALL; then the prologue says what holds."""
    left_over = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "far", "TORCHELASTIC_RUN_ID": "x", "OMPI_COMM": "y"}
    (tmp_path / "setup.sh").write_text("export NCCL_DEBUG=INFO MASTER_PORT=4321 OMP_NUM_THREADS=3\n")
    script = batch_script(Job([], tmp_path, launcher=launcher, prologue=str(tmp_path / "setup.sh")))
    _, _, code = run_batch(script, SLURM_CPUS_PER_TASK="4", SLURM_NTASKS_PER_NODE="2", **left_over)
    lines = (tmp_path / "work" / "environment").read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    assert code == 0
    assert (found["NCCL_DEBUG"], found["OMP_NUM_THREADS"]) == ("INFO", "3")
    assert found["MASTER_PORT"] == "4321"
    assert found["SRUN_CPUS_PER_TASK"] == ("4" if launcher == "srun" else "8")
    assert found.get("MASTER_ADDR") == (None if launcher == "srun" else "first")
    assert not found.keys() & (left_over.keys() - {"MASTER_ADDR"})


def test_a_launcher_that_is_none_is_refused(run_batch: Any) -> None:
    script = (package_root() / "launchers" / "slurm_train.sbatch").read_text()
    _, said, code = run_batch(script, LAUNCHER="mpirun")
    assert (said, code) == ("LAUNCHER=mpirun: needs srun or deepspeed\n", 2)


def test_a_batch_script_is_for_sbatch(run_batch: Any) -> None:
    _, said, code = run_batch((package_root() / "launchers" / "slurm_train.sbatch").read_text(), SLURM_JOB_ID="")
    assert code != 0
    assert "submit this file with sbatch" in said
