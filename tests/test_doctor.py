"""What `opd-ds doctor` finds on a node and on several, and a torchvision that does not load."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.schema import RunConfig
from opd_ds.doctor import disk, network, node, weights
from opd_ds.doctor.examination import Outcome, Subject, examine
from opd_ds.doctor.findings import Finding, Report, Seen, attempt, merge
from opd_ds.doctor.meeting import Meeting, StoppedError
from opd_ds.doctor.network import Measured
from opd_ds.doctor.table import print_report
from opd_ds.errors import UserError
from tests.ranks import fork, launch
from tests.tiny import run_settings, write_config

MIB = 2**20


@pytest.fixture
def broken_torchvision(tmp_path: Path) -> dict[str, str]:
    """An environment in which torchvision is installed and fails to import as its wheels do beside another torch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "from torchvision import ops\nraise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    (tmp_path / "torchvision" / "ops.py").write_text("")
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
    )
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}


def test_a_broken_torchvision_takes_nothing_down_and_doctor_says_so(broken_torchvision: dict[str, str]) -> None:
    code = (
        "import opd_ds; from transformers import CLIPModel; from diffusers import StableDiffusion3Pipeline; "
        "import peft, importlib.util; print(opd_ds.TORCHVISION_PROBLEM, importlib.util.find_spec('torchvision')); "
        "from opd_ds.cli.main import app; app(['doctor', '--json'])"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=broken_torchvision, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr[-2000:]
    assert "going on without it" in ended.stderr
    assert ended.stdout.splitlines()[0] == "RuntimeError: operator torchvision::nms does not exist None"
    report = report_in(ended.stdout)
    (finding,) = [f for f in report["findings"] if f["what"] == "torchvision"]
    assert not report["ok"]
    assert "0.28.0, does not load (RuntimeError: operator torchvision::nms does not exist)" in finding["found"]
    assert "pip uninstall torchvision" in finding["problem"]


# ---- what one rank sees ----


def one(seen: Iterable[Seen], what: str) -> Seen:
    (found,) = [item for item in seen if item.what == what]
    return found


def test_doctor_says_what_a_missing_compiler_would_be_needed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    seen = one(node.look_at_node(World()), "C++ compiler")
    assert "apt install g++" in seen.found
    assert seen.problem is None


def test_doctor_names_an_absent_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_PACKAGES", ("torch", "no-such-package"))
    assert one(node.look_at_node(World()), "no-such-package").problem == "pip install opd-ds"


@pytest.mark.parametrize(
    ("world", "devices", "fits"),
    [
        (World(3, 3, 4, 4), 4, True),
        (World(4, 4, 8, 8), 4, False),
        (World(3, 3, 4, 4), 1, True),  # srun --gpus-per-task: each rank sees its own device only
    ],
)
def test_processes_fit_the_devices_of_their_node(world: World, devices: int, fits: bool) -> None:
    problem = node.too_many_processes(world, devices)
    assert (problem is None) is fits
    assert fits or f"{world.local_size} processes for {devices} device" in str(problem)


def test_a_driver_that_torch_cannot_use_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert node.driver_version(file) is None
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build\n")
    assert node.driver_version(file) == "550.54.14"
    monkeypatch.setattr(node, "driver_version", lambda: "550.54.14")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert "torch sees no device" in str(one(node.accelerator(World()), "accelerator").problem)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert one(node.accelerator(World()), "accelerator").problem is None


def test_small_shared_memory_is_a_problem_of_several_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(64 * MIB, 0, 64 * MIB))  # type: ignore[attr-defined]
    assert one(node.shared_memory(World(0, 0, 2, 2), tmp_path), "shared memory").problem is not None
    assert one(node.shared_memory(World(), tmp_path), "shared memory").problem is None
    assert "mount a tmpfs" in str(one(node.shared_memory(World(0, 0, 2, 2), tmp_path / "no"), "shared memory").problem)
    assert list(node.shared_memory(World(1, 1, 2, 2), tmp_path)) == []


def test_limits_of_files_and_locked_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(node.resource, "getrlimit", lambda _: (1024, 1024))
    assert one(node.open_files(World(0, 0, 8, 8)), "open files").problem is None
    assert "ulimit -n" in str(one(node.open_files(World(0, 0, 1024, 8)), "open files").problem)
    (tmp_path / "mlx5_0").mkdir()
    assert one(node.locked_memory(World(0, 0, 16, 8), tmp_path / "no"), "locked memory").problem is None
    assert one(node.locked_memory(World(0, 0, 8, 8), tmp_path), "locked memory").problem is None
    assert "memlock" in str(one(node.locked_memory(World(0, 0, 16, 8), tmp_path), "locked memory").problem)
    monkeypatch.setattr(node.resource, "getrlimit", lambda _: (-1, -1))
    assert one(node.locked_memory(World(0, 0, 16, 8), tmp_path), "locked memory").found == "unlimited"
    assert one(node.open_files(World(0, 0, 10**6, 8)), "open files").problem is None


def test_the_output_folder_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    seen = list(disk.look_at_disk(tmp_path / "not" / "yet", needed=1))
    assert str(tmp_path) in one(seen, "output folder").found
    assert one(seen, "output folder").problem is None
    assert float(one(seen, "write speed").found.split()[0]) > 0
    assert "short" in str(one(disk.look_at_disk(tmp_path, needed=2**60), "output folder").problem)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_finding() -> None:
    (seen,) = attempt("output folder", lambda: disk.look_at_disk(Path("/proc"), None))
    assert "/proc cannot be written" in str(seen.problem)
    with disk.Token(Path("/proc")) as token:
        assert token.path is None
        assert token.failure


def test_a_check_that_raises_is_a_finding() -> None:
    def broken() -> Iterator[Seen]:
        raise OSError("disk on fire\nmore")
        yield

    assert attempt("disk", broken) == [Seen("disk", "failed", "OSError: disk on fire; this check could not be done")]


# ---- weights ----


def config_of(world: Path, output_dir: Path, **changes: Any) -> RunConfig:
    return DistilConfig.model_validate(run_settings(world, output_dir, **changes))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_trained_parameters_are_counted_without_loading(
    tiny_world: Path, tmp_path: Path, build_run: Callable[..., Any], kind: str
) -> None:
    config, parts = build_run(student__kind=kind)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in parts.student.module.parameters() if p.requires_grad)
    assert weights.trainable_parameters(config) == trained
    assert disk.checkpoint_bytes(config, tmp_path, trained) == 3 * 16 * trained
    for done in range(5):
        (tmp_path / "checkpoints" / f"round-{done:06d}").mkdir(parents=True)
    assert disk.checkpoint_bytes(config, tmp_path, trained) == 16 * trained
    absent = config_of(tiny_world, tmp_path, model__path="some-org/not-downloaded")
    assert weights.trainable_parameters(absent) is None


def test_files_of_a_run_are_found_and_told_apart(tiny_world: Path, tmp_path: Path) -> None:
    seen = weights.look_at_files(config_of(tiny_world, tmp_path))
    assert [item.problem for item in seen] == [None] * 5
    assert one(seen, "tasks.one.prompts").agree == one(seen, "tasks.two.prompts").agree
    # Same shapes, other weights.
    assert one(seen, "model.path").agree != one(seen, "tasks.one.teacher.path").agree


def test_absent_and_damaged_weights(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the doctor went to the network")

    monkeypatch.setattr("opd_ds.config.paths._from_hub", refuse)
    damaged = tmp_path / "base"
    shutil.copytree(tiny_world / "base", damaged)
    changes = {"tasks__one__teacher__path": "some-org/some-model/teacher", "tasks__two__prompts": "./gone.txt"}
    config = config_of(tiny_world, tmp_path, model__path=str(damaged), **changes)
    seen = weights.look_at_files(config)
    assert one(seen, "model.path").problem is None
    assert "not downloaded yet: `hf download some-org/some-model`" in str(one(seen, "tasks.one.teacher.path").problem)
    assert "no such file" in str(one(seen, "tasks.two.prompts").problem)

    (file,) = (damaged / "transformer").glob("*.safetensors")
    index = damaged / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file.name, "b": "part-2.safetensors"}}))
    assert "part-2.safetensors" in str(one(weights.look_at_files(config), "model.path").problem)
    index.unlink()
    file.write_bytes(file.read_bytes()[:-10])
    assert "cut off" in str(one(weights.look_at_files(config), "model.path").problem)


# ---- what all ranks make of it ----

NODES = ["a", "a", "b", "b"]


def test_equal_values_are_said_once_and_others_with_their_ranks() -> None:
    same = merge(NODES, [[Seen("torch", "2.8", agree="2.8")]] * 4)
    assert same == [Finding("torch", "2.8")]
    (differs,) = merge(NODES, [[Seen("torch", v, agree=v)] for v in ("2.8", "2.8", "2.8", "2.9")])
    assert differs.found == "ranks 0-2 on a, b: 2.8\nrank 3 on b: 2.9"
    assert differs.problem == "must be the same everywhere: ranks 0-2 on a, b: 2.8; rank 3 on b: 2.9"
    # One rank a node measures; speeds may differ.
    speeds = merge(NODES, [[Seen("speed", "1 MB/s")], [], [Seen("speed", "2 MB/s", "slow")], []])
    assert speeds == [Finding("speed", "rank 0 on a: 1 MB/s\nrank 2 on b: 2 MB/s", "rank 2 on b: slow")]


def test_ranks_that_share_a_device_are_named() -> None:
    seen = [[Seen("accelerator", "1 x H100", alone=f"device {uuid}")] for uuid in ("x", "y", "z", "z")]
    assert merge(NODES, seen[:3]) == [Finding("accelerator", "1 x H100")]
    problem = str(merge(NODES, seen)[0].problem)
    assert problem.startswith("must be different on each rank")
    assert "ranks 2-3 on b: device z" in problem


def test_a_check_that_one_rank_lacks_is_said_with_the_ranks_that_have_it() -> None:
    (failed,) = merge(["a", "a"], [[Seen("driver", "550", agree="550")], [Seen("driver", "failed", "OSError")]])
    assert failed == Finding("driver", "rank 0: 550\nrank 1: failed", "rank 1: OSError")


def measured(rank_total: float = 10.0, factor: float = 1.0) -> Measured:
    return Measured(None, "gloo", rank_total, 1e-4 * factor, tuple(1e-2 * factor for _ in network.SIZES))


def test_the_slowest_rank_decides_and_a_wrong_sum_is_named() -> None:
    good = network.group_findings([measured(factor=f) for f in (1, 1, 2, 1)], NODES)
    assert [finding.problem for finding in good] == [None] * 3
    # 2 (n - 1) / n x bytes / seconds
    assert f"1.0 MiB: {1.5 * MIB / 2e-2 / 1e9:.3g} GB/s (20 ms)" in good[1].found
    assert good[2].found.startswith("200 us")
    bad = network.group_findings([measured(t) for t in (10, 10, 10, 9)], NODES)
    assert "rank 3 on b got 9, expected 10" in str(bad[0].problem)


def test_a_group_that_does_not_work_is_named_and_the_rest_not_checked() -> None:
    broken = Measured(failure="no answer within 3 s")
    first, *others = network.group_findings([measured(), broken, broken, measured()], NODES)
    assert "ranks 1-2 on a, b: no answer within 3 s" in str(first.problem)
    assert [(o.checked, o.problem) for o in others] == [(False, None)] * 2


def test_work_that_hangs_or_raises_is_left() -> None:
    def broken() -> Measured:
        raise RuntimeError("NCCL error\ndetails")

    stop = threading.Event()
    hanging = network.within(0.05, lambda: measured(float(stop.wait(20))))
    assert hanging == (Measured(failure="no answer within 0.05 s"), False)
    stop.set()
    assert network.within(5, broken) == (Measured(failure="RuntimeError: NCCL error"), True)


def test_clocks_apart_are_named() -> None:
    assert network.clock_finding([100.0, 100.002], ["a", "b"]) == Finding("clocks", "2.0 ms apart")
    assert "rank 1 on b is 1.5 s ahead of rank 0 on a" in str(network.clock_finding([100.0, 101.5], ["a", "b"]).problem)


# ---- several ranks in one process: real store, no process group ----


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Examines with a rank per subject, each in a thread of its own on a node `node-<rank>`; the report of rank 0."""

    def examine_all(*subjects: Subject, timeout: float = 30) -> Report:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        monkeypatch.setattr(socket, "gethostname", lambda: threading.current_thread().name)
        size, outcomes = len(subjects), {}

        def run_rank(rank: int) -> None:
            try:
                outcomes[rank] = examine(World(rank, 0, size, 1), subjects[rank], timeout)
            except StoppedError:
                outcomes[rank] = Outcome(None)

        threads = [threading.Thread(target=run_rank, args=(r,), name=f"node-{r}", daemon=True) for r in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(outcomes) == list(range(size))
        assert [outcomes[rank].report for rank in range(1, size)] == [None] * (size - 1)
        assert outcomes[0].report is not None
        return outcomes[0].report

    monkeypatch.setattr(network, "measure", lambda world: measured(world.size * (world.size + 1) / 2))
    monkeypatch.setattr(network, "end_group", lambda: None)
    monkeypatch.setattr(disk, "WRITTEN", MIB)
    return examine_all


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def finding(report: Report, what: str) -> Finding:
    (found,) = [item for item in report.findings if item.what == what]
    return found


def test_two_nodes_that_agree(together: Callable[..., Report], tiny_world: Path, tmp_path: Path) -> None:
    report = together(*[Subject(lambda: config_of(tiny_world, tmp_path / "out"))] * 2)
    assert report.problems == []
    assert all(item.checked for item in report.findings)
    assert report.hosts == ["node-0", "node-1"]
    assert list(tmp_path.iterdir()) == []


def test_two_nodes_with_other_weights_folders_and_versions(
    together: Callable[..., Report], tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_node(first: str, second: str) -> Callable[..., Any]:
        return lambda *_: second if threading.current_thread().name == "node-1" else first

    monkeypatch.setattr(node, "version", on_node("1.0", "1.1"))
    monkeypatch.setattr(disk, "sees", lambda path: threading.current_thread().name == "node-0")
    other = tmp_path / "other.txt"
    other.write_text("a red 4\n")
    subjects = [
        Subject(lambda: config_of(tiny_world, tmp_path)),
        Subject(lambda: config_of(tiny_world, tmp_path, tasks__one__prompts=str(other))),
    ]
    report = together(*subjects)
    for what in ("torch", "run config", "tasks.one.prompts", "same output folder"):
        assert "rank 1 on node-1" in f"{finding(report, what).problem}{finding(report, what).found}"
        assert finding(report, what).problem is not None, what
    assert finding(report, "peft").problem == (
        "must be the same everywhere: rank 0 on node-0: 1.0; rank 1 on node-1: 1.1"
    )
    # torch differs: a group might hang, so none is started.
    assert "first fix torch" in finding(report, "all-reduce").found
    assert not finding(report, "all-reduce").checked


def test_a_config_that_one_node_cannot_read(together: Callable[..., Report], tiny_world: Path, tmp_path: Path) -> None:
    def unreadable() -> RunConfig:
        raise UserError("config file run.yaml does not exist")

    report = together(Subject(lambda: config_of(tiny_world, tmp_path)), Subject(unreadable))
    assert finding(report, "run config").problem == "rank 1 on node-1: config file run.yaml does not exist"
    assert finding(report, "all-reduce").problem is None


def test_a_rank_that_dies_in_between(
    together: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rank 1 gives no clock: rank 0 says so, keeps what it has, names what was not checked; the others are let go."""
    send = Meeting._set

    def lose(self: Meeting, key: str, text: str) -> None:
        if not key.endswith("/7/1"):
            send(self, key, text)

    monkeypatch.setattr(Meeting, "_set", lose)
    report = together(*[Subject(output_dir=tmp_path)] * 3, timeout=1)
    assert "rank 1 on node-1 gave no answer within 1 s" in str(finding(report, "ranks").problem)
    assert finding(report, "same output folder").checked
    assert not finding(report, "clocks").checked
    assert not finding(report, "all-reduce").checked


@pytest.mark.extended
def test_missing_ranks_are_named_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    """Rank 0 of 3 alone, then rank 1 alone: processes of their own, with exit codes."""
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    command = ("-m", "opd_ds.cli", "doctor", "--timeout", "2", "--output-dir", str(tmp_path))
    first = fork(*command, "--json", environment=environment | {"RANK": "0", "LOCAL_RANK": "0"})
    assert first.wait(120) == 1
    report = report_in(first.output)
    (ranks,) = [item for item in report["findings"] if item["what"] == "ranks"]
    assert "ranks 1-2 did not arrive within 2 s" in ranks["problem"]
    assert any(item["what"] == "torch" and item["found"] for item in report["findings"])
    second = fork(*command, environment=environment | {"RANK": "1", "LOCAL_RANK": "1"})
    assert second.wait(120) == 2
    assert "rank 1 of 3 has waited 2 s for rank 0" in second.output
    assert "Traceback" not in second.output


# ---- the command ----


def test_doctor_prints_a_line_per_finding(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--output-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    first_words = {line.split()[0] for line in result.output.splitlines() if line.strip()}
    assert first_words >= {"opd-ds", "torch", "deepspeed", "accelerator", "write"}
    assert max(len(line) for line in result.output.splitlines()) <= 100
    assert "1 rank on 1 node: no problem found" in result.output


def test_long_lists_and_problems_stay_readable(capsys: pytest.CaptureFixture[str]) -> None:
    found = "\n".join(f"rank {rank} on node-{rank}: {rank} MB/s" for rank in range(64))
    print_report(Report(["a"], [Finding("write speed", found, "slow " * 60), Finding("clocks", "not checked: x")]))
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 100
    assert any("and 52 more, see --json" in line for line in lines)


def test_an_unknown_recipe_is_a_finding_without_traceback() -> None:
    result = CliRunner().invoke(app, ["doctor", "--recipe", "nonsense", "--json"])
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert "recipe 'nonsense': unknown" in next(f for f in report["findings"] if f["what"] == "run config")["problem"]


# ---- on several ranks ----


def report_in(output: str) -> dict[str, Any]:
    """The JSON among other lines."""
    begin = output.index('{\n "ok"')
    return json.JSONDecoder().raw_decode(output[begin:])[0]  # type: ignore[no-any-return]


@pytest.mark.multirank
def test_doctor_on_two_ranks(tiny_world: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "run.yaml", run_settings(tiny_world, tmp_path / "out"))
    ended = launch(2, "--config", str(file), "--json", "--timeout", "250", command="doctor")
    report = report_in(ended.stdout)
    assert report["ok"], report
    assert len(report["hosts"]) == 2
    assert all(item["checked"] for item in report["findings"])
    (reduced,) = [item for item in report["findings"] if item["what"] == "all-reduce"]
    assert reduced["found"] == "sum right over 2 ranks (gloo)"
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.multirank
def test_a_rank_with_another_version_is_named(tmp_path: Path) -> None:
    script = tmp_path / "rank_dependent.py"
    script.write_text(
        "import os, sys\n"
        "from opd_ds.doctor import node\n"
        "real = node.version\n"
        "node.version = lambda name: '0.0.1' if name == 'peft' and os.environ['RANK'] == '1' else real(name)\n"
        f"sys.argv = ['opd-ds', 'doctor', '--json', '--timeout', '250', '--output-dir', {str(tmp_path)!r}]\n"
        "from opd_ds.cli.main import main\n"
        "main()\n"
    )
    ended = launch(2, script=str(script), check=False)
    assert ended.returncode == 1, ended.stdout[-3000:]
    problems = {item["what"]: item["problem"] for item in report_in(ended.stdout)["findings"] if item["problem"]}
    assert list(problems) == ["peft"]
    assert "rank 1: 0.0.1" in problems["peft"]
    assert "Traceback" not in ended.stdout
