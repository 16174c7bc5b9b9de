"""Learning rates, schedules and other values of the run reach every optimizer of DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

from opd_ds.cluster.world import World
from opd_ds.config.loading import load_config
from opd_ds.engine import (
    Group,
    NetworkSizes,
    Schedule,
    StudentEngine,
    ds_components,
    fill_sizes,
    learning_rates,
    student_ds_config,
)
from opd_ds.errors import UserError
from tests.test_ds_config import completed
from tests.test_engine import config, network, step

# The example for ZeRO-3 in the documentation of transformers.
TRANSFORMERS: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": "auto"},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def params(config_file: Path, kind: str, *overrides: str, **given: Any) -> dict[str, Any]:
    """Of the optimizer, complete."""
    template = {"optimizer": {"type": kind, "params": given}}
    found: dict[str, Any] = completed(config_file, template, *overrides)["optimizer"]["params"]
    return found


# ---- the run's values ----


def test_the_example_of_transformers_is_filled_in(config_file: Path) -> None:
    settings = ("optimizer.lr=3e-4", "optimizer.warmup_rounds=2", "run.rounds=8")
    ds_config = completed(config_file, TRANSFORMERS, *settings)
    assert ds_config["optimizer"]["params"]["lr"] == 3e-4
    expected = {"warmup_min_lr": 0.0, "warmup_max_lr": 3e-4, "warmup_num_steps": 2}
    assert ds_config["scheduler"] == {"type": "WarmupLR", "params": expected}
    assert ds_config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}  # pinned, by DeepSpeed's default
    assert '"auto"' not in json.dumps(fill_sizes(ds_config, NetworkSizes(1000, 500, 100, 100)))
    decay = TRANSFORMERS | {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}}
    with pytest.raises(UserError, match="keep one"):
        completed(config_file, decay, *settings)
    filled = completed(config_file, decay, "run.rounds=2000", "train.inner_epochs=2")["scheduler"]["params"]
    assert filled == {"total_num_steps": 4000, "warmup_max_lr": 1e-3}
    with pytest.raises(UserError, match="WarmupLR all 2 rounds have the learning rate 0 and train nothing"):
        completed(config_file, TRANSFORMERS, "optimizer.warmup_rounds=2", "run.rounds=2")


@pytest.mark.parametrize(
    "kind",
    ["adamw", "ADAM", "Adagrad", "lamb", "lion", "muon", "Adafactor", "sgd", "rmsprop", "RAdam", "adamax", "adadelta"],
)
def test_the_runs_learning_rate_reaches_every_optimizer(config_file: Path, kind: str) -> None:
    assert params(config_file, kind, "optimizer.lr=3e-4")["lr"] == 3e-4
    assert params(config_file, kind, "optimizer.lr=3e-4", lr="auto")["lr"] == 3e-4
    assert params(config_file, kind, "optimizer.weight_decay=0.5")["weight_decay"] == 0.5
    with pytest.raises(UserError, match=r"optimizer\.params\.lr = 0\.02 .* optimizer\.lr = 0\.001 differ"):
        params(config_file, kind, lr=0.02)


def test_muon_is_refused_where_checkpoints_would_lack_its_momentum(config_file: Path) -> None:
    def stage(number: int, *overrides: str) -> dict[str, Any]:
        template = {"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": number}}
        return completed(config_file, template, *overrides)

    for number, precision in ((1, "fp32"), (2, "fp32"), (2, "bf16")):
        with pytest.raises(UserError, match="another layout than the masters"):
            stage(number, f"precision={precision}")
    for number, precision in ((0, "fp32"), (1, "bf16"), (3, "fp32")):
        assert stage(number, f"precision={precision}")["optimizer"]["type"] == "Muon"


def test_values_that_an_optimizer_does_not_take_are_refused_and_its_own_defaults_stay(config_file: Path) -> None:
    with pytest.raises(UserError, match=r"'SGD' has no betas; remove optimizer\.betas"):
        params(config_file, "SGD", "optimizer.betas=[0.8, 0.9]")
    with pytest.raises(UserError, match=r"'Lion' has no eps"):
        params(config_file, "Lion", "optimizer.eps=1e-6")
    assert params(config_file, "Lion") == {"lr": 1e-3}
    assert params(config_file, "Lion", "optimizer.betas=[0.8, 0.9]")["betas"] == [0.8, 0.9]
    assert params(config_file, "AdamW", lr="1e-3")["lr"] == 1e-3
    two = params(config_file, "Muon", muon_lr="auto", adam_lr="auto")
    assert (two["muon_lr"], two["adam_lr"]) == (1e-3, 1e-3)
    with pytest.raises(UserError, match=r"muon_lr = 0\.02 .* differ"):
        params(config_file, "Muon", muon_lr=0.02)
    peak = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-2}}
    with pytest.raises(UserError, match=r"cycle_max_lr = 0\.01 .* optimizer\.lr = 0\.001 differ"):
        completed(config_file, {"scheduler": peak})


def test_optimizers_and_schedulers_are_those_of_this_version_of_deepspeed() -> None:
    ours = {name.lower() for name in ds_components._OPTIMIZERS}
    # mup's need networks built for them.
    assert {name for name in DEEPSPEED_OPTIMIZERS if not name.startswith("mu") or name == "muon"} <= ours
    assert all(
        name in DEEPSPEED_OPTIMIZERS or hasattr(torch.optim, kind) or kind == "AdamW8bit"
        for kind in ds_components._OPTIMIZERS
        for name in [kind.lower()]
    )
    assert set(VALID_LR_SCHEDULES) == set(ds_components._PEAK_OF)
    taken = {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS, "muon_lr", "adam_lr"}
    assert taken == ds_components._MUON_TAKES


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        *(("AdamW", 2), ("Adagrad", 1), ("sgd", 3), ("RMSprop", 0)),
        # Compiles kernels.
        *(pytest.param("muon", stage, marks=pytest.mark.slow) for stage in (0, 3)),
    ],
)
def test_the_learning_rate_of_a_built_optimizer(group: Group, kind: str, stage: int) -> None:
    template = {
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": kind},
    }
    wanted = config(optimizer__lr=3e-4)
    ds_config = student_ds_config(template, wanted, World(), "x.json")
    engine = StudentEngine(network(), ds_config, group, "auto", Schedule.of(wanted, ds_config))
    step(engine)
    assert {settings["lr"] for settings in engine._param_groups} == {3e-4}


@pytest.mark.parametrize("kind", ["Lion", "Lamb"])
def test_optimizers_without_kernels_for_cpus(group: Group, kind: str) -> None:
    template = {"optimizer": {"type": kind}}
    ds_config = student_ds_config(template, config(), World(), "x.json")
    with pytest.raises(UserError, match=f"optimizer.type = '{kind}': DeepSpeed computes it on GPUs only"):
        StudentEngine(network(), ds_config, group)


# ---- schedules ----


def rates(config_file: Path, *overrides: str, template: dict[str, Any] | None = None) -> list[float]:
    wanted = load_config(None, config_file, ["optimizer.lr=1", *overrides])
    ds_config = student_ds_config(template or {}, wanted, World(), "mine.json")
    return learning_rates(Schedule.of(wanted, ds_config), ds_config, wanted.run.rounds * wanted.train.inner_epochs)


def test_schedules_are_what_their_names_say(config_file: Path) -> None:
    assert rates(config_file, "run.rounds=3") == [1, 1, 1]
    assert rates(config_file, "run.rounds=5", "optimizer.warmup_rounds=4") == [0.25, 0.5, 0.75, 1, 1]
    cosine = ("optimizer.schedule=cosine", "optimizer.min_lr=0.2")
    assert rates(config_file, "run.rounds=5", *cosine) == pytest.approx([1, 0.883, 0.6, 0.317, 0.2], abs=1e-3)
    assert rates(config_file, "run.rounds=3", "optimizer.schedule=cosine") == pytest.approx([1, 0.5, 0])
    warm = rates(config_file, "run.rounds=6", "optimizer.warmup_rounds=2", *cosine)
    assert warm == pytest.approx([0.5, 1, 0.883, 0.6, 0.317, 0.2], abs=1e-3)
    assert rates(config_file, "run.rounds=1", *cosine) == [1]
    assert rates(config_file, "run.rounds=2", "optimizer.warmup_rounds=4", *cosine) == [0.25, 0.5]
    # By optimizer steps, where a round has several.
    assert rates(config_file, "run.rounds=2", "train.inner_epochs=2", "optimizer.warmup_rounds=2") == [
        0.25,
        0.5,
        0.75,
        1,
    ]


def test_a_scheduler_of_the_ds_config_is_deepspeeds_own(config_file: Path) -> None:
    linear = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}}
    assert rates(config_file, "run.rounds=7", template={"scheduler": linear}) == [0, 0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.min_lr=0.1", r"min_lr = 0\.1 is read only with schedule = 'cosine'"),
        ("optimizer.min_lr=-1", r"optimizer\.min_lr = -1: .*at least 0"),
        ("optimizer.lr=.inf", r"optimizer\.lr = inf: .*finite"),
        ("optimizer.lr=.nan", r"optimizer\.lr = nan"),
        ("optimizer.lr=0", r"optimizer\.lr = 0: .*more than 0"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas: has 1 entries and needs more"),
        ("optimizer.betas=[0.9, 1.0]", r"optimizer\.betas\.1 = 1\.0: .*less than 1"),
    ],
)
def test_optimizer_values_that_cannot_be(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, config_file, [override])


def test_a_cosine_does_not_rise(config_file: Path) -> None:
    with pytest.raises(UserError, match=r"optimizer\.min_lr = 2 is above the learning rate, 1"):
        rates(config_file, "optimizer.schedule=cosine", "optimizer.min_lr=2")


@pytest.mark.parametrize("stage", [0, 3])
def test_the_engine_steps_with_the_schedules_rate(group: Group, stage: int) -> None:
    """SGD moves by the rate times the gradient, from the first step on; a resume takes up the schedule where it was."""
    template = {
        "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD"},
    }
    settings = {"lr": 0.5, "max_grad_norm": 0.0, "warmup_rounds": 2, "schedule": "cosine", "min_lr": 0.1}
    wanted = config(optimizer=settings, run__rounds=4)
    ds_config = student_ds_config(template, wanted, World(), "x.json")

    def build() -> StudentEngine:
        return StudentEngine(network(), ds_config, group, "auto", Schedule.of(wanted, ds_config))

    engine, seen, moved = build(), [], []
    for _ in range(4):
        before = engine.gather_weights(trainable_only=True)
        norm = step(engine)
        after = engine.gather_weights(trainable_only=True)
        seen.append(engine.learning_rate)
        moved.append(float(torch.stack([(before[k] - after[k]).norm() for k in before]).norm()) / norm)
    assert seen == pytest.approx([0.25, 0.5, 0.3, 0.1])
    assert moved == pytest.approx(seen, rel=1e-3)
    again = build()
    scalars = engine.scalar_state()
    again._engine.global_steps = scalars["engine"]["global_steps"] - 1
    step(again)
    assert again.learning_rate == pytest.approx(0.1)
