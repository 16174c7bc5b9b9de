"""The engine and what it knows of DeepSpeed: shards, fp16, memory, builds of ops, determinism."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.engine import Group, StudentEngine, free_memory, student_ds_config
from opd_ds.engine.build_lock import BuildLock
from opd_ds.errors import UserError
from opd_ds.training.auto_batch import AutoMicroBatch
from opd_ds.utils.determinism import make_deterministic
from tests.ranks import launch
from tests.tiny import run_settings

INPUT = torch.linspace(-1, 1, 24).reshape(4, 6)


def config(**changes: Any) -> DistilConfig:
    return DistilConfig.model_validate(run_settings(Path("world"), Path("out"), **changes))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def student(
    group: Group, stage: int, *, gather: Any = "auto", zero: dict[str, Any] | None = None, **changes: Any
) -> StudentEngine:
    """An engine around a network of 83 parameters."""
    settings = {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0} | (zero or {})
    wanted = config(optimizer__max_grad_norm=0.0, **changes)
    ds_config = student_ds_config({"zero_optimization": settings}, wanted, World(), "x.json")
    if wanted.precision == "fp16":
        ds_config["fp16"] |= {"initial_scale_power": 10}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted.precision]
    return StudentEngine(network().to(dtype), ds_config, group, gather)


def step(engine: StudentEngine, factor: float = 1.0) -> float:
    """One step on half a squared error; the gradient's norm."""
    dtype = next(engine.module.parameters()).dtype
    loss = engine.module(INPUT.to(dtype)).float().square().mean() * factor
    engine.accumulate(loss, last=True)
    return engine.step()


@pytest.fixture
def fp16_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed refuses fp16 on CPUs without fast kernels for it; torch has slow ones."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


# ---- shards ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fragments_are_what_deepspeed_says_in_public(group: Group, stage: int, precision: str) -> None:
    engine = student(group, stage, precision=precision)
    step(engine)
    found = dict(engine.module.named_parameters())
    assert {fragment.name for fragment in engine.fragments} == found.keys()
    for fragment in engine.fragments:
        whole = safe_get_full_fp32_param(found[fragment.name]).flatten()
        assert torch.equal(fragment.master, whole[fragment.start : fragment.start + fragment.numel])


def renamed(change: Callable[[Any], None]) -> Callable[..., Any]:
    """`deepspeed.initialize` of a version in which `change` was made to the engine."""
    initialize = deepspeed.initialize

    def start(**arguments: Any) -> Any:
        made = initialize(**arguments)
        change(made[0])
        return made

    return start


def without_mapping(engine: Any) -> None:
    for parameter in engine.module.parameters():
        del parameter._hp_mapping


def one_overlooked(engine: Any) -> None:
    engine.module[2].weight._hp_mapping = None


def without_flats(engine: Any) -> None:
    del engine.optimizer.fp32_partitioned_groups_flat


def halved(engine: Any) -> None:
    for parameter in engine.module.parameters():
        parameter.partition_numel = lambda parameter=parameter: parameter.ds_numel // 2


def without_counter(engine: Any) -> None:
    del engine.skipped_steps


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (2, without_mapping, r"DeepSpeed [\d.]+: Parameter has no '_hp_mapping', .*install deepspeed>="),
        (2, one_overlooked, r"of '2\.weight' all ranks together hold 0 elements instead of 24; install deepspeed>="),
        (3, without_flats, r"ZeroOptimizer_Stage3 has no 'fp32_partitioned_groups_flat'"),
        (3, halved, r"of '0\.weight' all ranks together hold 24 elements instead of 48"),
        (0, without_counter, r"DeepSpeedEngine has no 'skipped_steps'"),
    ],
)
def test_a_deepspeed_that_keeps_its_shards_elsewhere_is_refused(
    group: Group, monkeypatch: pytest.MonkeyPatch, stage: int, change: Callable[[Any], None], message: str
) -> None:
    """At the start: later, checkpoints would lack them and averages would not follow them."""
    monkeypatch.setattr(deepspeed, "initialize", renamed(change))
    with pytest.raises(UserError, match=message):
        student(group, stage)


def test_an_optimizer_that_keeps_its_state_elsewhere_is_refused(group: Group) -> None:
    engine = student(group, 2)
    step(engine)
    inner = engine._engine.optimizer.optimizer
    inner.state[torch.zeros(1)] = inner.state.pop(engine.fragments[0].flat)
    with pytest.raises(UserError, match="keeps the optimizer's state elsewhere"):
        engine.state_dict()


# ---- fp16 ----


def test_fp16_without_zero_is_refused() -> None:
    """DeepSpeed 0.19.8 divides gradients by a loss scale that it has not multiplied the loss by."""
    with pytest.raises(UserError, match=r"zero_optimization\.stage = 0 with precision = 'fp16'.*zero1"):
        student_ds_config({}, config(precision="fp16"), World(), "x.json")


@pytest.mark.usefixtures("fp16_on_cpu")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_takes_the_steps_of_fp32(group: Group, stage: int) -> None:
    def after(precision: str) -> tuple[float, dict[str, torch.Tensor]]:
        engine = student(group, stage, precision=precision)
        norm = step(engine)
        return norm, {fragment.name: fragment.master.clone() for fragment in engine.fragments}

    (norm, weights), (exact_norm, exact) = after("fp16"), after("fp32")
    assert norm == pytest.approx(exact_norm, rel=5e-3)
    start = {name: value.detach().flatten() for name, value in network().half().float().named_parameters()}
    for name, value in weights.items():
        moved, wanted = value - start[name], exact[name] - dict(network().named_parameters())[name].detach().flatten()
        assert torch.allclose(moved, wanted, rtol=0.1, atol=1e-5), name
        assert wanted.abs().max() > 5e-4  # Adam's first step is its learning rate, unless the gradient is below its eps


@pytest.mark.usefixtures("fp16_on_cpu")
def test_skipped_steps_are_counted(group: Group) -> None:
    engine = student(group, 2, precision="fp16")
    before = [fragment.master.clone() for fragment in engine.fragments]
    step(engine, factor=1e8)
    assert engine.skipped_steps == 1
    assert all(map(torch.equal, before, (fragment.master for fragment in engine.fragments)))
    step(engine)
    assert engine.skipped_steps == 1


@pytest.mark.usefixtures("fp16_on_cpu")
def test_a_skipped_round_is_said(
    build_run: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from opd_ds.runs.monitor import Monitor, read_metrics

    settings = tmp_path / "fp16.json"
    settings.write_text('{"zero_optimization": {"stage": 1}, "fp16": {"initial_scale_power": 40}}')
    wanted, parts = build_run(precision="fp16", deepspeed=str(settings))
    with caplog.at_level(logging.WARNING, "opd_ds"), Monitor(wanted, World(), 0) as monitor:
        monitor.start_rounds(0)
        monitor.round(parts.trainer.run_round(0))
    assert "round 1: a gradient overflowed in fp16, 1 optimizer step(s) were skipped" in caplog.text
    assert [row["skipped_steps"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [1]


# ---- devices ----


def test_nothing_waits_for_the_device_in_forward_and_step(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's measure of throughput does, from the third step on, unless it is switched off."""
    engine = student(group, 1)
    waits: list[int] = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(1))
    for _ in range(4):
        step(engine)
    assert not waits


def test_free_memory_is_the_drivers_and_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of 80 of which the driver has 30 free; of the allocator's 40, 25 are in use."""
    card = SimpleNamespace(
        mem_get_info=lambda device: (30, 80), memory_reserved=lambda device: 40, memory_allocated=lambda device: 25
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: card)
    monkeypatch.setattr(
        get_accelerator(), "available_memory", lambda *_: pytest.fail("asks NVML, which knows no UUIDs")
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5d2b1e7c-0000-0000-0000-000000000000")
    assert free_memory(torch.device("cuda", 0)) == 45


def test_halving_works_with_the_oldest_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.8 has no `torch.accelerator.empty_cache`."""
    monkeypatch.delattr(torch.accelerator, "empty_cache", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)

    def compute(rows: slice) -> torch.Tensor:
        if rows.stop - rows.start > 2:
            raise torch.OutOfMemoryError
        return torch.arange(rows.start, rows.stop)

    batches = AutoMicroBatch("rows", None, shrinks=True)
    assert torch.cat(batches.run(5, compute)).tolist() == [0, 1, 2, 3, 4]
    assert batches.size == 2


@pytest.mark.parametrize("gather", ["once", "auto"])
def test_parameters_on_nvme_are_gathered_layer_by_layer(
    group: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gather: str
) -> None:
    """DeepSpeed asserts where more of them are asked at once than it has buffers for."""
    initialize = deepspeed.initialize

    def on_host(config: dict[str, Any], **arguments: Any) -> Any:
        del config["zero_optimization"]["offload_param"]  # no NVMe here
        return initialize(config=config, **arguments)

    monkeypatch.setattr(deepspeed, "initialize", on_host)
    with caplog.at_level(logging.INFO, "opd_ds"):
        engine = student(group, 3, gather=gather, zero={"offload_param": {"device": "nvme", "nvme_path": "/tmp"}})
    with engine.gathered() as asked:
        assert asked is engine
    assert caplog.text.count("parameters are on NVMe") == 1


def test_broadcast_gives_rank_0s_value(group: Group) -> None:
    assert group.broadcast({"a": [1, None]}) == {"a": [1, None]}


# ---- builds of ops ----


def test_every_build_is_guarded(group: Group) -> None:
    assert cpp_extension.FileBaton is BuildLock


def test_the_lock_of_a_killed_process_of_ours_is_taken_at_once(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("opd_ds")
    lock = BuildLock(str(tmp_path / "lock"))
    started = time.monotonic()
    assert lock.try_acquire()
    assert time.monotonic() - started < 5
    lock.release()
    assert not (tmp_path / "lock").exists()


def test_the_lock_of_a_killed_stranger_is_taken_when_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    os.utime(tmp_path / "lock", (0, 0))
    lock = BuildLock(str(tmp_path / "lock"))
    assert lock.try_acquire()
    lock.release()


def assert_waits_for(release: Callable[[], None], lock: BuildLock) -> None:
    """`lock` is not had before `release`, and is then."""
    waiting = threading.Thread(target=lock.try_acquire)
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive()
    release()
    waiting.join(10)
    assert not waiting.is_alive()
    lock.release()


def test_a_live_lock_stays_however_old_it_is(tmp_path: Path) -> None:
    """Of another program on this machine, which is slow: it would fail when it releases what is gone."""
    (tmp_path / "op.so").touch()
    stranger = FileBaton(str(tmp_path / "lock"))
    assert stranger.try_acquire()
    os.utime(tmp_path / "lock", (0, 0))
    assert_waits_for(stranger.release, BuildLock(str(tmp_path / "lock")))


def test_one_builds_after_the_other(tmp_path: Path) -> None:
    first, second = (BuildLock(str(tmp_path / "lock")) for _ in range(2))
    assert first.try_acquire()
    assert_waits_for(first.release, second)


# ---- determinism ----


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    attention = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cuda.enable_cudnn_sdp(attention)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("as_before")
def test_a_deterministic_run_has_the_same_numbers_on_a_cpu(build_run: Callable[..., Any]) -> None:
    def measured() -> tuple[float, float]:
        report = build_run()[1].trainer.run_round(0)
        return report.losses.loss, report.grad_norm

    plain = measured()
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert measured() == plain


FREED = """
import sys, torch
from pathlib import Path
from opd_ds.engine.memory import return_freed_memory

def resident():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) // 1024

if sys.argv[1] == "returned":
    return_freed_memory()
del (first := [torch.ones(7 << 20)])[:]  # what is freed once, glibc takes for the size of what will be wanted again
before = resident()
tensors = [(torch.ones(1 << 20), bytes(100_000)) for _ in range(40)]
kept = [small for _, small in tensors]
del tensors
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
@pytest.mark.multirank
def test_freed_host_memory_goes_back_to_the_system(tmp_path: Path) -> None:
    (tmp_path / "freed.py").write_text(FREED)

    def left(how: str) -> int:
        return int(launch(1, how, script=str(tmp_path / "freed.py")).stdout)

    returned = left("returned")  # MiB, of 160
    assert returned < 20
    assert returned < left("kept")  # how much less depends on what else reclaims memory
