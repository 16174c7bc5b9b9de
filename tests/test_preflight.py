"""What a start refuses, the dry run refuses in the same words, and both before a network is loaded."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import opd_ds.runs.files
import opd_ds.runs.identity
import opd_ds.runs.preflight
import opd_ds.runs.resume
import opd_ds.runs.setup
from opd_ds.cli.dry_run import describe
from opd_ds.cli.main import app
from opd_ds.cluster.world import World, planned_world
from opd_ds.config.loading import load_config, parse_config
from opd_ds.config.schema import RunConfig
from opd_ds.doctor.examination import Local, Subject
from opd_ds.doctor.findings import Seen
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.rewards import reward_names
from opd_ds.rewards.base import missing
from opd_ds.rewards.registry import needs_of
from opd_ds.runs.output_lock import LOCK_FILE
from opd_ds.runs.resume import Start
from opd_ds.runs.train import train
from opd_ds.testing.tiny.sd3 import PROMPTS
from tests.runs import metrics
from tests.tiny import run_settings, with_changes, write_config, write_lora

LONGEST = 345  # characters: three lines of 120, less `opd-ds: error: `
Broken = Callable[[dict[str, Any], Path], None]


def both_refuse(config: RunConfig, group: Group, monkeypatch: pytest.MonkeyPatch, start: Start | None = None) -> str:
    """The one message of dry run and start; no reward and no network is loaded for it."""
    start = start or Start()

    def loads(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded before it was checked")

    with monkeypatch.context() as patched:
        patched.setattr(opd_ds.runs.setup, "build_rewards", loads)
        patched.setattr(opd_ds.runs.setup, "student_module", loads)
        with pytest.raises(UserError) as planned:
            describe(config, World(), start)
        with pytest.raises(UserError) as started:
            train(config, group, start.resume, start.allowed)
    assert str(planned.value) == str(started.value)
    assert len(str(planned.value)) <= LONGEST
    return str(planned.value)


# ---- the table: how a run is broken, and what is said ----


def changed(**changes: Any) -> Broken:
    return lambda data, _: with_changes(data, changes) and None


def _base_without_weights(data: dict[str, Any], folder: Path) -> None:
    shutil.copytree(data["model"]["path"], folder / "half")
    next((folder / "half" / "transformer").glob("*.safetensors")).unlink()
    data["model"]["path"] = str(folder / "half")


def _base_of_another_family(data: dict[str, Any], folder: Path) -> None:
    shutil.copytree(data["model"]["path"], folder / "other")
    file = folder / "other" / "transformer" / "config.json"
    file.write_text(file.read_text().replace("SD3Transformer2DModel", "FluxTransformer2DModel"))
    data["model"]["path"] = str(folder / "other")


def _teacher_with_another_schedule(data: dict[str, Any], folder: Path) -> None:
    shutil.copytree(data["tasks"]["one"]["teacher"]["path"], folder / "shifted")
    file = folder / "shifted" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": 7.0}))
    data["tasks"]["one"]["teacher"]["path"] = str(folder / "shifted")


def _cut_off_teacher(data: dict[str, Any], folder: Path) -> None:
    shutil.copytree(data["tasks"]["two"]["teacher"]["path"], folder / "cut")
    file = folder / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    data["tasks"]["two"]["teacher"]["path"] = str(folder / "cut")


def _start_of_another_rank(data: dict[str, Any], folder: Path) -> None:
    start = write_lora(Path(data["model"]["path"]), folder / "start", rank=2)
    data["student"] |= {"kind": "lora", "start": str(start)}


def _full_start_of_a_lora(data: dict[str, Any], folder: Path) -> None:
    data["student"] |= {"kind": "lora", "start": data["tasks"]["one"]["teacher"]["path"]}


def _output_is_a_file(data: dict[str, Any], folder: Path) -> None:
    (folder / "taken").write_text("")
    data["run"]["output_dir"] = str(folder / "taken")


def _output_below_a_file(data: dict[str, Any], folder: Path) -> None:
    (folder / "taken").write_text("")
    data["run"]["output_dir"] = str(folder / "taken" / "runs" / "1")


def _no_json(data: dict[str, Any], folder: Path) -> None:
    (folder / "ds.json").write_text("{,}")
    data["deepspeed"] = str(folder / "ds.json")


def _hpz_that_does_not_divide(data: dict[str, Any], folder: Path) -> None:
    zero = {"stage": 3, "zero_hpz_partition_size": 3}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    data["deepspeed"] = str(folder / "ds.json")


def _empty_prompts(data: dict[str, Any], folder: Path) -> None:
    (folder / "prompts.txt").write_text("\n\n")
    data["tasks"]["one"]["prompts"] = str(folder / "prompts.txt")


def _no_row_is_kept(data: dict[str, Any], folder: Path) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "tag": "a"}) + "\n" for p in PROMPTS))
    data["tasks"]["one"]["prompts"] = {"path": str(folder / "prompts.jsonl"), "where": {"tag": "b"}}


def _teach(data: dict[str, Any], **rollout: Any) -> None:
    prompts = data["tasks"]["one"]["prompts"]
    data["tasks"] = {"bright": {"prompts": prompts, "rewards": ["jpeg_compressibility"]}}
    data["teach"] = {"algorithm": "guard", "group": 4}
    data["rollout"] |= {"samples": 8, "kernel": "flow", "noise_level": 0.7} | rollout


BROKEN: dict[str, tuple[Broken, str]] = {
    "no model": (changed(model__path="./gone"), r"model\.path = './gone': no such file"),
    "unknown family": (changed(model__family="sd33"), r"model\.family = 'sd33'.*Did you mean 'sd3'"),
    "folder of another family": (_base_of_another_family, r"model\.path = .*its transformer is FluxTransf"),
    "family of another folder": (changed(model__family="flux"), r"model\.path = .*its transformer is SD3Transf"),
    "size": (changed(model__height=13), r"model\.height x model\.width = 13x\d+: both must be multiples of"),
    "frames of images": (changed(model__frames=9), r"model\.frames = 9: SD3 draws images"),
    "base without weights": (_base_without_weights, r"model\.path = .*no .*/transformer/diffusion_pytorch_model"),
    "no teacher": (changed(tasks__one__teacher__path="./gone"), r"tasks\.one\.teacher\.path = './gone'"),
    "teacher's schedule": (_teacher_with_another_schedule, r"tasks\.one\.teacher\.path = .*shift = 7\.0"),
    "cut off teacher": (_cut_off_teacher, r"tasks\.two\.teacher\.path = .*damaged"),
    "full teacher shared": (changed(tasks__one__teacher__placement="shared"), r"teacher\.placement = 'shared' makes"),
    "no prompts": (changed(tasks__one__prompts="gone.txt"), r"tasks\.one\.prompts = 'gone\.txt': no such file"),
    "no eval prompts": (changed(tasks__one__eval_prompts="gone.txt"), r"tasks\.one\.eval_prompts = 'gone\.txt'"),
    "empty prompts": (_empty_prompts, r"prompts\.txt has no prompts"),
    "nothing left of the prompts": (_no_row_is_kept, r"where: no row has tag = 'b'; tag has 'a'"),
    "no start": (changed(student__start="./gone"), r"student\.start = './gone'"),
    "rank of the start": (_start_of_another_rank, r"student\.start = .*has rank 2, student\.lora\.rank is 4"),
    "full start of a LoRA": (_full_start_of_a_lora, r"is a full checkpoint and student\.kind = 'lora'"),
    "targets": (
        changed(student__kind="lora", student__lora__targets=["attn.to_q", "attn.to_qq"]),
        r"student\.lora\.targets: LoRA targets \['attn\.to_qq'\] match no module",
    ),
    "no ds_config": (changed(deepspeed="zero4"), r"deepspeed = 'zero4': no such file.*Did you mean 'zero"),
    "no JSON": (_no_json, r"ds\.json, line 1: not JSON"),
    "fp16 without ZeRO": (changed(precision="fp16", deepspeed="zero0"), r"stage = 0 with precision = 'fp16'"),
    "ranks per node": (_hpz_that_does_not_divide, r"zero_hpz_partition_size = 3 does not divide the 1 ranks"),
    "unknown reward": (changed(tasks__one__rewards=["ocrr"]), r"tasks\.one\.rewards = 'ocrr': unknown"),
    "reward's option": (
        changed(tasks__one__rewards=[{"name": "jpeg_compressibility", "options": {"qualty": 1}}]),
        r"unknown option 'qualty'",
    ),
    "reward's weights": (changed(tasks__one__rewards=["pickscore"]), r"reward 'pickscore': weights not found"),
    "no reward server": (
        changed(tasks__one__rewards=[{"name": "remote", "options": {"url": "http://127.0.0.1:9"}}]),
        r"no reward server answers there",
    ),
    "text cache": (changed(model__text_encoders="cached"), r"text cache .*there is none yet for"),
    "output is a file": (_output_is_a_file, r"run\.output_dir = .*taken': cannot be written: Not a directory"),
    "output below a file": (_output_below_a_file, r"run\.output_dir = .*cannot be written: Not a directory"),
    "steps without noise": (
        lambda data, _: _teach(data, kernel="cps", trained_steps={"fraction": 1.0}),
        r"draws noise on 3 of its 4 steps",
    ),
    "one step without noise": (
        lambda data, _: _teach(data, kernel="cps", trained_steps={"steps": [0, 3]}),
        r"draws no noise on step 3, which rollout\.trained_steps trains",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_a_start_refuses_the_dry_run_refuses(
    tiny_world: Path, tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    breaks, said = BROKEN[name]
    data = run_settings(tiny_world, tmp_path / "out")
    breaks(data, tmp_path)
    monkeypatch.setenv("OPD_DS_WEIGHTS", str(tmp_path / "none"))
    found = both_refuse(parse_config(data), group, monkeypatch)
    assert re.search(said, found), found
    assert not (tmp_path / "out").exists()


# ---- resuming ----


@pytest.fixture(scope="module")
def finished(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory, group: Group) -> Path:
    """The folder of a run of two rounds, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    train(parse_config(run_settings(tiny_world, folder, run__rounds=2, run__checkpoint_every=1)), group)
    return folder


def _another_task(data: dict[str, Any], _: Path) -> None:
    data["tasks"]["three"] = data["tasks"]["one"]


def _fewer_tasks(data: dict[str, Any], _: Path) -> None:
    del data["tasks"]["two"]


def _other_prompts(data: dict[str, Any], folder: Path) -> None:
    (folder / "fewer.txt").write_text("a red 3\n")
    data["tasks"]["one"]["prompts"] = str(folder / "fewer.txt")


def _cut_off_checkpoint(data: dict[str, Any], folder: Path) -> None:
    copied = Path(data["run"]["output_dir"])
    for shard in copied.glob("checkpoints/round-*/shard-*"):
        shard.write_bytes(shard.read_bytes()[:-1])


NOT_RESUMED: dict[str, tuple[Broken, Start, str]] = {
    "occupied": (changed(), Start("never"), r"run\.output_dir already holds .*round-000002; give --resume auto"),
    "no checkpoint": (changed(), Start("/nowhere"), r"--resume: /nowhere: no state\.json there"),
    "all damaged": (_cut_off_checkpoint, Start("auto"), r"all 2 checkpoints are damaged, the newest first: round-0000"),
    "fewer rounds": (changed(run__rounds=1), Start("auto"), r"2 rounds are done, and run\.rounds = 1; set it to 2 to"),
    "setting": (
        changed(rollout__steps=5),
        Start("auto"),
        r"out/checkpoints/round-000002/state\.json: rollout\.steps was 4 and is now 5; set it back, or start a new run",
    ),
    "learning rate": (
        changed(optimizer__lr=0.002),
        Start("auto"),
        r"optimizer\.lr was 0\.001 and is now 0\.002; set it back, accept it with --allow-change optimizer\.lr, or",
    ),
    "another change than the allowed": (
        changed(optimizer__lr=0.002, rollout__steps=5), Start("auto", ("optimizer.lr",)), r"rollout\.steps was 4"
    ),
    "no such change": (changed(), Start("auto", ("rollout.steps",)), r"--allow-change rollout\.steps: not possible"),
    "mistyped change": (changed(), Start("auto", ("optimizer.lrr",)), r"Did you mean 'optimizer\.lr'\?"),
    "no average to go on with": (
        changed(student__ema__decay=0.0),
        Start("auto", ("student.ema.decay",)),
        r"student\.ema\.decay was 0\.9 and is now 0\.0; set it back, or start",
    ),
    "new task": (
        _another_task,
        Start("auto"),
        r"tasks\.three is new, .*; start a new run, .*from this one's export with student\.start",
    ),
    "task gone": (_fewer_tasks, Start("auto"), r"tasks\.two is gone"),
    "prompts": (
        _other_prompts, Start("auto"), r"tasks\.one\.prompts is not what it was \(SHA-256 \w{12}, now \w{12}\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_RESUMED)
def test_what_a_resume_refuses_the_dry_run_refuses(
    finished: Path, tiny_world: Path, tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """And neither touches a file of the run."""
    breaks, start, said = NOT_RESUMED[name]
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    data = run_settings(tiny_world, folder, run__rounds=3, run__checkpoint_every=1)
    breaks(data, tmp_path)

    def files() -> list[tuple[Path, int]]:
        return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.name != LOCK_FILE)

    before = files()
    found = both_refuse(parse_config(data), group, monkeypatch, start)
    assert re.search(said, found), found
    assert files() == before


def test_an_allowed_change_takes_effect(
    finished: Path, tiny_world: Path, tmp_path: Path, group: Group, caplog: pytest.LogCaptureFixture
) -> None:
    """From the resume on, and the next resume needs no further word."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    changes: dict[str, Any] = {"run__checkpoint_every": 1, "optimizer__lr": 2e-3, "tasks__one__weight": 0.5}
    config = parse_config(run_settings(tiny_world, folder, run__rounds=3, **changes))
    train(config, group, "auto", ["optimizer.lr", "tasks.one.weight"])
    assert [row["learning_rate"] for row in metrics(folder)] == [1e-3, 1e-3, 2e-3]
    assert "optimizer.lr was 0.001 and is now 0.002: accepted by --allow-change" in caplog.text
    train(parse_config(run_settings(tiny_world, folder, run__rounds=4, **changes)), group, "auto")
    assert [row["round"] for row in metrics(folder)] == [1, 2, 3, 4]


# ---- what is planned ----


def test_processes_that_are_planned_for(tiny_world: Path, tmp_path: Path) -> None:
    data = run_settings(tiny_world, tmp_path / "out", rollout__samples=6)
    file = str(write_config(tmp_path / "run.yaml", data))
    result = CliRunner().invoke(app, ["train", "--config", file, "--dry-run", "--processes", "2x2"])
    assert result.exit_code == 0, result.output
    assert "processes              4, 2 a node" in result.output
    assert "samples per process    2 per task (2 padding samples" in result.output
    assert '"train_batch_size": 32' in result.output
    _hpz_that_does_not_divide(data, tmp_path)
    file = str(write_config(tmp_path / "run.yaml", data))
    assert CliRunner().invoke(app, ["train", "--config", file, "--dry-run", "--processes", "6"]).exit_code == 0
    result = CliRunner().invoke(app, ["train", "--config", file, "--dry-run", "--processes", "8"])
    assert "zero_hpz_partition_size = 3 does not divide the 8 ranks" in str(result.exception)
    result = CliRunner().invoke(app, ["train", "--config", file, "--processes", "8"])
    assert "--processes 8: is for --dry-run" in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["0", "x8", "8x", "-1", "2x0", "eight", ""])
def test_processes_are_numbers(text: str) -> None:
    with pytest.raises(UserError, match="expected a number, or NODESxPROCESSES"):
        planned_world(text)


def test_placements_are_decided_in_what_is_shown_and_kept(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    config = parse_config(run_settings(tiny_world, tmp_path / "out", run__rounds=1, student__kind="lora"))
    shown = describe(config, World(), Start())
    train(config, group)
    for resolved in (shown.partition("# arithmetic")[0], (tmp_path / "out" / "config.yaml").read_text()):
        tasks = yaml.safe_load(resolved)["tasks"]
        assert (tasks["one"]["teacher"]["placement"], tasks["two"]["teacher"]["placement"]) == ("resident", "shared")


# ---- the list is complete ----


def functions(module: ModuleType) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(inspect.getsource(module))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def called(function: ast.FunctionDef) -> set[str]:
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}


def test_nothing_is_refused_outside_the_preflight() -> None:
    """Every refusal of the modules that prepare a run is reached from `preflight`; loading refuses nothing itself."""
    assert not [
        node for node in ast.walk(ast.parse(inspect.getsource(opd_ds.runs.setup))) if isinstance(node, ast.Raise)
    ]
    modules = (opd_ds.runs.files, opd_ds.runs.identity, opd_ds.runs.preflight, opd_ds.runs.resume)
    known = {name: function for module in modules for name, function in functions(module).items()}
    reached, waiting = set[str](), ["preflight"]
    while waiting:
        name = waiting.pop()
        if name in known and name not in reached:
            reached.add(name)
            waiting += called(known[name])
    refusing = {
        name for name, function in known.items() if any(isinstance(node, ast.Raise) for node in ast.walk(function))
    }
    # What rewards say of themselves is known once they are loaded, which is before the networks.
    assert refusing - reached == {"refuse_other_rewards"}
    assert len(refusing & reached) >= 8
    assert called(functions(opd_ds.runs.setup)["prepare"]) >= {"preflight", "refuse_other_rewards"}


# ---- who else calls it ----


def test_launch_checks_the_start_before_it_writes(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the job's processes; unless it is told that the files are elsewhere."""
    monkeypatch.chdir(tmp_path)
    data = run_settings(tiny_world, tmp_path / "out")
    _hpz_that_does_not_divide(data, tmp_path)
    command = ["launch", "--slurm", "--config", str(write_config(tmp_path / "run.yaml", data))]
    result = CliRunner().invoke(app, [*command, "--nodes", "2", "--tasks-per-node", "4"])
    assert "zero_hpz_partition_size = 3 does not divide the 8 ranks" in str(result.exception)
    assert not (tmp_path / "opd-ds.sbatch").exists()
    fitting = [*command, "--nodes", "2", "--tasks-per-node", "3", "--allow-change", "optimizer.lr"]
    result = CliRunner().invoke(app, fitting)
    assert result.exit_code == 0, result.output
    assert "--allow-change optimizer.lr" in (tmp_path / "opd-ds.sbatch").read_text()
    data["tasks"]["one"]["prompts"] = "/only/in/the/container.txt"
    write_config(tmp_path / "run.yaml", data)
    assert "container.txt" in str(CliRunner().invoke(app, fitting).exception)
    assert CliRunner().invoke(app, [*fitting, "--unchecked"]).exit_code == 0


def test_doctor_checks_the_start(tiny_world: Path, tmp_path: Path) -> None:
    """What the files alone do not show; where one is missing, that is said first."""

    def seen(**changes: Any) -> Seen:
        config = parse_config(run_settings(tiny_world, tmp_path / "out", **changes))
        return next(one for one in Local(World(), Subject(lambda: config)).seen if one.what == "start of the run")

    assert seen().problem is None
    assert "both must be multiples of" in str(seen(model__height=13).problem)
    missing = seen(model__height=13, tasks__one__prompts=str(tmp_path / "gone.txt"))
    assert missing.problem is None
    assert missing.found == "not checked: first see to tasks.one.prompts"


# ---- how long a message gets ----


@pytest.mark.parametrize(
    "override",
    [
        "rollout.stepss=3",
        "rollout.kernel=eular",
        "tasks.one.teacher.placement=nowhere",
        "optimizer.lr=-1",
        "student.lora.rank=x",
        "evaluation={micro: 3}",
        "objective.method=pp",
        "objective.target=velocity",
        "probes={one: {eval_prompts: a.txt}}",
        "rollout.trained_steps={queries: 3, fraction: 0.5}",
        "run=3",
        "nothing=3",
        "model.pathh=x",
        "tasks={}",
        "teach={algorithm: nfft}",
        "watch.every=[1, 2]",
    ],
)
def test_messages_about_settings_are_short(tiny_world: Path, tmp_path: Path, override: str) -> None:
    file = write_config(tmp_path / "run.yaml", run_settings(tiny_world, tmp_path / "out"))
    with pytest.raises(UserError) as error:
        load_config(None, file, [override])
    assert all(len(line) <= LONGEST for line in str(error.value).splitlines()), str(error.value)


def test_every_reward_that_is_not_there_is_said_in_three_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_DS_WEIGHTS", "/a/folder/of/people/weights")  # how long it is, is theirs to choose
    alone = [name for name in reward_names() if name != "mix"]  # which needs what its parts need
    needs = [problem for name in alone for problem in missing(name, needs_of(name))]
    assert len(needs) > 4
    assert all(len(str(problem)) <= LONGEST for problem in needs), max(map(str, needs), key=len)
