"""Optimizers that keep less state than AdamW: AdamW8bit (bitsandbytes), Adafactor (torch), Muon (DeepSpeed)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import load_config
from opd_ds.engine import (
    Group,
    Schedule,
    ShardedEma,
    ShardReader,
    StudentEngine,
    check_shapes,
    privates,
    state_bytes,
    student_ds_config,
    write_shard,
)
from opd_ds.engine.fragments import Fragment
from opd_ds.engine.moments import carried, restore
from opd_ds.errors import UserError
from opd_ds.runs.setup import prepare
from opd_ds.runs.train import train
from tests.ranks import TRAIN_MANY, launch
from tests.runs import metrics
from tests.test_ds_config import completed
from tests.test_engine import INPUT, config, step
from tests.tiny import run_settings, write_config

NEEDS_BITS = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="pip install 'opd-ds[adamw8bit]'")
LR, ROUNDS = 1e-3, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """DeepSpeed's Muon compiles its functions, for longer than they take here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def small(precision: str = "fp32") -> nn.Module:
    """8,490 parameters: bitsandbytes keeps float32 of tensors below 4,096."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 64), nn.GELU(), nn.Linear(64, 120), nn.GELU(), nn.Linear(120, 2))
    return layers.to(DTYPES[precision])


def engine_of(group: Group, kind: str, stage: int, precision: str = "fp32", **zero: Any) -> StudentEngine:
    settings = {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0, **zero}
    wanted = config(optimizer={"type": kind, "lr": LR, "max_grad_norm": 0.0}, precision=precision)
    ds_config = student_ds_config({"zero_optimization": settings}, wanted, World(), "x.json")
    return StudentEngine(small(precision), ds_config, group, "auto", Schedule.of(wanted, ds_config))


def weights(engine: StudentEngine) -> dict[str, Tensor]:
    return engine.gather_weights(trainable_only=True)


def masters(engine: StudentEngine) -> Tensor:
    """Of an engine on one rank, flat."""
    state = engine.state_dict()
    return torch.cat([state[key] for key in sorted(state) if key.startswith("master/")])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def by_hand(group: Group, optimizer: Callable[[nn.Module], torch.optim.Optimizer], steps: int) -> dict[str, Tensor]:
    """The weights that a library's optimizer, called without an engine, makes of the same network."""
    network = small()
    made = optimizer(network)
    for _ in range(steps):
        network(INPUT).square().mean().backward()
        made.step()
        made.zero_grad()
    return {name: value.detach() for name, value in network.named_parameters()}


# ---- the libraries' own updates ----


def adafactor(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(network.parameters(), lr=LR)


def muon(network: nn.Module) -> torch.optim.Optimizer:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    groups = [
        {"params": [one for one in network.parameters() if (one.dim() > 1) == by_muon], "use_muon": by_muon, "lr": LR}
        for by_muon in (True, False)
    ]
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)


def adamw8bit(network: nn.Module) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(network.parameters(), lr=LR, weight_decay=1e-4)
    return made


@pytest.mark.parametrize(
    ("kind", "optimizer", "stages"),
    [
        ("Adafactor", adafactor, (0,)),
        ("Muon", muon, (0, 3)),
        pytest.param("AdamW8bit", adamw8bit, (0,), marks=NEEDS_BITS),
    ],
)
def test_an_engine_updates_as_the_library_does_and_the_average_follows(
    group: Group, kind: str, optimizer: Callable[[nn.Module], torch.optim.Optimizer], stages: tuple[int, ...]
) -> None:
    wanted = by_hand(group, optimizer, 3)
    for stage in stages:
        engine = engine_of(group, kind, stage)
        ema, average = ShardedEma(engine, config().student.ema), weights(engine)
        for done in range(1, 4):
            step(engine)
            ema.update()
            decay = min(0.9, (1 + done) / (10 + done))
            average = {name: average[name].lerp(value, 1 - decay) for name, value in weights(engine).items()}
        found = weights(engine)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        with ema.swapped_in():
            for name, value in weights(engine).items():
                torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)


@NEEDS_BITS
@pytest.mark.parametrize("stage", [0, 2])
def test_eight_bits_learn_what_adamw_learns(configured: Callable[..., DistilConfig], group: Group, stage: int) -> None:
    """After some rounds the weights have moved by the same, to a few percent."""

    def learned(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        wanted = configured(optimizer__type=kind, deepspeed=f"zero{stage}")
        parts = prepare(wanted, group)
        before = weights(parts.student)
        for index in range(ROUNDS):
            parts.trainer.run_round(index)
        return before, weights(parts.student)

    def flat(found: dict[str, Tensor]) -> Tensor:
        return torch.cat([value.flatten() for value in found.values()])

    before, wanted = map(flat, learned("AdamW"))
    _, found = map(flat, learned("AdamW8bit"))
    error = float((found - wanted).norm() / (wanted - before).norm())
    assert 0 < error < 0.1


# ---- checkpoints ----

LESS = [
    *(pytest.param("AdamW8bit", stage, "fp32", marks=NEEDS_BITS) for stage in (0, 1, 2, 3)),
    *(pytest.param("AdamW8bit", stage, "bf16", marks=NEEDS_BITS) for stage in (0, 1, 3)),
    *(("Adafactor", 0, precision) for precision in ("fp32", "bf16")),
    *(("Muon", stage, precision) for stage, precision in ((0, "fp32"), (1, "bf16"), (3, "fp32"), (3, "bf16"))),
]


@pytest.mark.parametrize(("kind", "stage", "precision"), LESS)
def test_they_go_on_bit_for_bit_from_a_checkpoint(
    group: Group, tmp_path: Path, kind: str, stage: int, precision: str
) -> None:
    engine = engine_of(group, kind, stage, precision)
    start = weights(engine)
    for _ in range(3):
        step(engine)
    write_shard(engine.state_dict(), tmp_path, 0, 1)
    scalars = engine.scalar_state()
    again = engine_of(group, kind, stage, precision)
    again.load_state_dict(ShardReader(tmp_path), scalars)
    for _ in range(2):
        step(engine)
        step(again)
    assert same(weights(engine), weights(again))
    assert not same(start, weights(engine))


@pytest.mark.parametrize(("stage", "other", "precision"), [(0, 3, "fp32"), (3, 1, "bf16"), (1, 0, "bf16")])
def test_muon_keeps_its_state_at_another_stage(
    group: Group, tmp_path: Path, stage: int, other: int, precision: str
) -> None:
    engine, again = (engine_of(group, "Muon", one, precision) for one in (stage, other))
    for _ in range(2):
        step(engine)
    wanted = engine.state_dict()
    write_shard(wanted, tmp_path, 0, 1)
    again.load_state_dict(ShardReader(tmp_path), engine.scalar_state())
    assert {key.split("/")[0] for key in wanted} == {"master", "momentum_buffer", "exp_avg", "exp_avg_sq"}
    assert same(wanted, again.state_dict())
    step(again)
    assert again.scalar_state()["optimizer_step"] == 3


@pytest.mark.slow  # compiles DeepSpeed's Adam for CPUs
def test_muon_offloaded_is_muon(group: Group, tmp_path: Path) -> None:
    there, here = (engine_of(group, "Muon", 3, **zero) for zero in ({"offload_optimizer": {"device": "cpu"}}, {}))
    for _ in range(3):
        step(there)
        step(here)
    for name, value in weights(here).items():
        torch.testing.assert_close(weights(there)[name], value, rtol=0, atol=1e-7)
    write_shard(there.state_dict(), tmp_path, 0, 1)
    again = engine_of(group, "Muon", 3, offload_optimizer={"device": "cpu"})
    again.load_state_dict(ShardReader(tmp_path), there.scalar_state())
    step(there)
    step(again)
    assert same(weights(there), weights(again))


@NEEDS_BITS
@pytest.mark.parametrize(("stage", "other"), [(0, 2), (3, 0)])
def test_eight_bits_go_on_nearly_the_same_at_another_stage(
    group: Group, tmp_path: Path, stage: int, other: int
) -> None:
    """Blocks are others there, and small tensors have float32 at stage 0 alone. Without state the step is another."""
    engine = engine_of(group, "AdamW8bit", stage)
    for _ in range(3):
        step(engine)
    write_shard(engine.state_dict(), tmp_path, 0, 1)
    scalars, before = engine.scalar_state(), masters(engine)
    again, fresh = (engine_of(group, "AdamW8bit", other) for _ in range(2))
    for one in (again, fresh):
        one.load_state_dict(ShardReader(tmp_path), scalars)
    privates.inner_optimizer(fresh._engine.optimizer).state.clear()
    for one in (engine, again, fresh):
        step(one)
    moved, apart, without = (float((masters(engine) - one).norm()) for one in (before, masters(again), masters(fresh)))
    assert apart < 0.1 * moved < without


@NEEDS_BITS
def test_other_ranks_cut_other_blocks(tmp_path: Path) -> None:
    """Values then come back as 8 bits hold them; the same blocks come back as they were."""
    from bitsandbytes.optim import AdamW8bit

    torch.manual_seed(0)
    flat = torch.zeros(5000, requires_grad=True)
    inner = AdamW8bit([flat])
    for _ in range(3):
        flat.grad = torch.randn(5000) * torch.linspace(1e-3, 1, 5000)
        inner.step()
    saved = dict(carried(inner.state[flat], Fragment("w", 0, 5000, flat, 0)))
    assert {kind: value.element_size() for kind, value in saved.items()} == {
        "exp_avg_code": 1, "exp_avg_scale": 4, "exp_avg_sq_code": 1, "exp_avg_sq_scale": 4,
    }  # fmt: skip
    write_shard({f"{kind}/0/w": value for kind, value in saved.items()}, tmp_path, 0, 1)
    shards = ShardReader(tmp_path)

    def restored(start: int, numel: int) -> dict[str, Tensor]:
        other = torch.zeros(numel)
        found: dict[str, Tensor] = restore(
            AdamW8bit([other]), [Fragment("w", start, numel, other, 0)], shards, shards.kinds
        )
        return found

    def values(state: dict[str, Tensor]) -> list[Tensor]:
        blocks = torch.arange(state["state1"].numel()) // 256
        return [state[f"qmap{n}"][state[f"state{n}"].long()] * state[f"absmax{n}"][blocks] for n in (1, 2)]

    found = restored(0, 5000)
    assert all(torch.equal(found[name], inner.state[flat][name]) for name in ("state1", "state2", "absmax1", "absmax2"))
    wanted = values(inner.state[flat])
    for mine, theirs in zip(values(restored(300, 4500)), wanted, strict=True):
        assert 0 < float((mine - theirs[300:4800]).norm() / theirs[300:4800].norm()) < 0.02
    few = restored(700, 100)  # so few are kept in float32
    assert torch.equal(few["state1"], wanted[0][700:800])
    assert torch.equal(few["state2"], wanted[1][700:800])


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("kind", "wrote", "goes_on"),
    [
        ("Adafactor", "zero0", "zero0"),
        pytest.param("Muon", "zero3", "zero0", marks=pytest.mark.extended),
        pytest.param("AdamW8bit", "zero2", "zero0", marks=NEEDS_BITS),
    ],
)
def test_a_run_goes_on_on_other_ranks_and_is_exported(
    tiny_world: Path, tmp_path: Path, group: Group, kind: str, wrote: str, goes_on: str
) -> None:
    """With its average; its numbers are nearly those of a run that was never stopped."""

    def settings(name: str, deepspeed: str, rounds: int) -> dict[str, Any]:
        changes = {"optimizer__type": kind, "run__checkpoint_every": 2, "run__rounds": rounds}
        return run_settings(tiny_world, tmp_path / name, deepspeed=deepspeed, **changes)

    launch(2, str(write_config(tmp_path / "on_two.yaml", settings("stopped", wrote, 2))), script=TRAIN_MANY)
    train(DistilConfig.model_validate(settings("stopped", goes_on, ROUNDS)), group, resume="auto")
    train(DistilConfig.model_validate(settings("straight", goes_on, ROUNDS)), group)
    found, wanted = metrics(tmp_path / "stopped"), metrics(tmp_path / "straight")
    assert [row["round"] for row in found] == [1, 2, 3, 4]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.02)
    places = (tiny_world / "base", tmp_path / "stopped" / "export", tmp_path / "straight" / "export")
    base, ours, straight = (exported(place / "transformer") for place in places)
    assert float((ours - straight).norm()) < 0.2 * float((straight - base).norm())


def exported(folder: Path) -> Tensor:
    """The weights of a diffusers folder, flat."""
    state = load_file(next(folder.glob("*.safetensors")))
    return torch.cat([state[name].flatten() for name in sorted(state)])


# ---- settings ----


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("AdamW", 2),
        *(pytest.param("AdamW8bit", stage, marks=NEEDS_BITS) for stage in (0, 2)),
        ("Adafactor", 0),
        ("Muon", 3),
    ],
)
def test_the_plan_counts_what_they_keep(group: Group, kind: str, stage: int) -> None:
    engine = engine_of(group, kind, stage)
    step(engine)
    states = privates.inner_optimizer(engine._engine.optimizer).state.values()
    named = [pair for state in states for pair in state.items() if isinstance(pair[1], Tensor)]
    kept = sum(value.nbytes for name, value in named if value.dim() > 0 and not name.startswith("qmap"))
    ds_config = {"optimizer": {"type": kind}, "zero_optimization": {"stage": stage}}
    assert kept == pytest.approx(state_bytes(ds_config, engine.shapes), rel=0.02)


def test_the_type_is_the_runs_or_the_ds_configs(config_file: Path) -> None:
    def kind(template: dict[str, Any], *overrides: str) -> str:
        found: str = completed(config_file, template, *overrides)["optimizer"]["type"]
        return found

    auto = {"optimizer": {"type": "auto", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}}}
    assert kind(auto) == kind({}) == "AdamW"
    assert kind(auto, "optimizer.type=Adafactor") == kind({}, "optimizer.type=Adafactor") == "Adafactor"
    assert kind({"optimizer": {"type": "lion"}}) == "Lion"
    assert kind({"optimizer": {"type": "lion"}}, "optimizer.type=Lion") == "Lion"
    with pytest.raises(UserError, match=r"optimizer\.type = Lion and the run config's optimizer\.type = SGD differ"):
        kind({"optimizer": {"type": "Lion"}}, "optimizer.type=SGD")
    with pytest.raises(UserError, match=r"optimizer\.type = 'AdamW16'.*AdamW8bit"):
        load_config(None, config_file, ["optimizer.type=AdamW16"])
    with pytest.raises(UserError, match=r"'Adafactor' has no betas"):
        kind(auto, "optimizer.type=Adafactor", "optimizer.betas=[0.8, 0.9]")


@pytest.mark.parametrize(
    ("kind", "zero", "message"),
    [
        ("Adafactor", {"stage": 1}, "ZeRO flattens the weights"),
        pytest.param(
            "AdamW8bit", {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "on the device", marks=NEEDS_BITS
        ),
    ],
)  # fmt: skip
def test_stages_at_which_they_do_not_work(config_file: Path, kind: str, zero: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        completed(config_file, {"zero_optimization": zero}, f"optimizer.type={kind}")


def test_muon_at_stage_1_takes_matrices_only() -> None:
    def ds_config(stage: int) -> dict[str, Any]:
        return {"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": stage}}

    shapes = {"patch_embedding.weight": [8, 4, 1, 2, 2], "blocks.0.scale_shift_table": [1, 6, 8]}
    check_shapes(ds_config(3), shapes)
    check_shapes(ds_config(1), {"patch_embedding.weight": [8, 4, 1, 2, 2], "proj.weight": [8, 8]})
    with pytest.raises(UserError, match=r"'blocks\.0\.scale_shift_table' of shape \[1, 6, 8\] is no matrix"):
        check_shapes(ds_config(1), shapes)


def test_without_bitsandbytes_eight_bits_are_refused(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"'AdamW8bit' needs bitsandbytes: pip install 'opd-ds\[adamw8bit\]'"):
        completed(config_file, {}, "optimizer.type=AdamW8bit")


@NEEDS_BITS
def test_a_wrong_value_of_eight_bits_is_refused(config_file: Path) -> None:
    template = {"optimizer": {"type": "AdamW8bit", "params": {"min_8bit_size": 1, "is_paged": True}}}
    with pytest.raises(UserError, match=r"optimizer\.params\.is_paged: AdamW8bit has no such parameter"):
        completed(config_file, template)
