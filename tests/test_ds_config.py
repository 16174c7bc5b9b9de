"""A ds_config is checked as a whole when it is read; learning rates and other values of the run reach DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from opd_ds.cluster.world import World
from opd_ds.config.loading import load_config
from opd_ds.config.paths import package_root
from opd_ds.engine import (
    NetworkSizes,
    fill_sizes,
    frozen_ds_config,
    parameter_builder,
    read_ds_config,
    student_ds_config,
    swapped_apart,
)
from opd_ds.engine.ds_settings import ELSEWHERE, FIXED, DsSettings
from opd_ds.errors import UserError


def completed(config_file: Path, template: dict[str, Any], *overrides: str) -> dict[str, Any]:
    return student_ds_config(template, load_config(None, config_file, list(overrides)), World(0, 0, 4, 2), "mine.json")


def test_every_shipped_ds_config_completes(config_file: Path) -> None:
    config = load_config(None, config_file, [])
    files = sorted((package_root() / "ds_configs").glob("*.json"))
    assert len(files) >= 9
    for file in files:
        template = read_ds_config(file)
        if file.stem.startswith("zero_inference"):
            ds_config = frozen_ds_config(template, "bf16", 4, file.name)
            assert "optimizer" not in ds_config
        else:
            ds_config = student_ds_config(template, config, World(0, 0, 4, 2), file.name)
            assert ds_config["optimizer"]["params"]["lr"] == 1e-3
        batch = ds_config["train_micro_batch_size_per_gpu"] * ds_config["gradient_accumulation_steps"] * 4
        assert ds_config["train_batch_size"] == batch
        assert '"auto"' not in json.dumps(fill_sizes(ds_config, NetworkSizes(1000, 500, 100, 100)))


@pytest.mark.parametrize(
    ("template", "overrides", "message"),
    [
        ({"train_batch_size": 64}, [], r"train_batch_size = 64 is not taken from there.*rollout\.samples"),
        ({"gradient_accumulation_steps": 2}, [], r"gradient_accumulation_steps = 2"),
        ({"bf16": {"enabled": True}}, [], r"bf16\.enabled = True contradicts precision = 'fp32'"),
        ({"torch_autocast": {"enabled": True}}, [], r"torch_autocast is not supported here: set precision"),
        ({"gradient_clipping": 5.0}, ["optimizer.max_grad_norm=1.0"], r"gradient_clipping = 5.0 .* = 1.0 differ"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, ["optimizer.lr=2.0"], r"optimizer\.params\.lr = 1"),
        ({"scheduler": {"type": "WarmupLR"}}, ["optimizer.warmup_rounds=3"], "has a scheduler"),
    ],
)
def test_ds_config_conflicts_are_errors(
    config_file: Path, template: dict[str, Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        completed(config_file, template, *overrides)


def test_explicit_ds_config_values_stand(config_file: Path) -> None:
    explicit = completed(config_file, {"gradient_clipping": 5.0, "optimizer": {"type": "Lion", "params": {"lr": 1e-3}}})
    assert explicit["gradient_clipping"] == 5.0
    assert explicit["optimizer"] == {"type": "Lion", "params": {"lr": 1e-3}}


def test_teacher_ds_config_refusals() -> None:
    with pytest.raises(UserError, match="a teacher engine needs 3"):
        frozen_ds_config({"zero_optimization": {"stage": 2}}, "fp32", 1, "mine.json")
    with pytest.raises(UserError, match="a teacher never trains; remove 'optimizer'"):
        frozen_ds_config({"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam"}}, "fp32", 1, "mine.json")


# ---- keys and types ----


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # Misspelled keys, at every level.
        ({"zero_optimisation": {"stage": 3}}, r"unknown key 'zero_optimisation'.* Did you mean 'zero_optimization'\?"),
        ({"gradient_cliping": 1.0, "fp61": {}}, r"'gradient_cliping'.* 'gradient_clipping'\?; unknown key 'fp61'"),
        ({"zeroOptimization": {"stage": 3}}, r"Did you mean 'zero_optimization'\?"),
        ({"ZERO_OPTIMIZATION": {"stage": 3}}, r"Did you mean 'zero_optimization'\?"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"devise": "auto"}}}, r"_param\.devise'.* 'device'\?"),
        ({"stage": 3}, r"unknown key 'stage', .* It belongs into 'zero_optimization'"),
        ({"aio": {"blocksize": 1}}, r"unknown key 'aio\.blocksize'.* 'block_size'\?"),
        ({"optimizer": {"type": "Adam", "param": {}}}, r"unknown key 'optimizer\.param'.* 'params'\?"),
        ({"bf16": {"loss_scale": 0}}, r"unknown key 'bf16\.loss_scale'"),
        # Types.
        ({"zero_optimization": True}, r'zero_optimization = true: needs an object such as \{"stage": 2\}'),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization\.stage = 4: allowed are 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, r"zero_optimization\.stage = true: needs a number"),
        ({"zero_optimization": {"stage": None}}, r"zero_optimization\.stage = null: allowed are"),
        ({"zero_optimization": {"stage3_prefetch_bucket_size": 15099494.4}}, r"size = 15099494\.4: .*valid integer"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
            r'"disk": allowed are none, cpu, nv',
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": True}}, r"offload_optimizer = true: needs an object"),
        ({"steps_per_print": "inf"}, r'steps_per_print = "inf": .*valid integer'),
        ({"gradient_clipping": -1}, r"gradient_clipping = -1: .*greater than or equal to 0"),
        ({"communication_data_type": "float"}, r"communication_data_type = \"float\": .*'fp32', 'fp16' or 'bf16'"),
        ({"fp16": {"loss_scale": "high"}}, r'fp16\.loss_scale = "high": .*must be a number'),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, r"grad_accum_dtype = 'bf16' at stage 0 .* allowed are fp32"),
        ([], "needs an object at the top level"),
        # "auto" is no decision about sharding.
        ({"zero_optimization": {"stage": "auto"}}, r'zero_optimization\.stage = "auto": decide it'),
        ({"zero_optimization": {"stage": 3, "offload_param": "auto"}}, r'offload_param = "auto": decide it'),
        # Layouts that DeepSpeed leaves out in silence.
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, r"'cpu' needs stage 3, not 2"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, r"'cpu' needs stage 1, not 0"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, r"nvme_path: required and missing"),
        ({"zero_optimization": {"stage": 3, "cpu_offload_param": True}}, r"cpu_offload_param is not supported here"),
        # What the run config owns, what ends a process, what changes masters or the gradient's mean.
        ({"wandb": {"enabled": True, "project": "x"}}, r"wandb is not supported here: set trackers"),
        ({"tensorboard": {"enabled": True}}, r"tensorboard is not supported here: .*run\.output_dir"),
        ({"comms_logger": {"enabled": True}}, "comms_logger is not supported here"),
        ({"flops_profiler": {"enabled": True}}, r"flops_profiler is not supported here: `opd-ds plan`"),
        ({"autotuning": {"enabled": True}}, r"autotuning is not supported here: it ends the process"),
        ({"elasticity": {"enabled": True}}, r"elasticity is not supported here: a checkpoint resumes on any number"),
        ({"activation_checkpointing": {"profile": True}}, r"set student\.gradient_checkpointing"),
        ({"amp": {"enabled": True}}, "amp is not supported here: set precision"),
        ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention is not supported here"),
        ({"zero3_init_flag": True}, "zero3_init_flag is not supported here: it is accelerate's"),
        ({"prescale_gradients": True}, "prescale_gradients is not supported here"),
        ({"gradient_predivide_factor": 2.0}, r"gradient_predivide_factor = 2\.0: only 1\.0"),
        ({"gradient_allreduce_op": "sum"}, r'gradient_allreduce_op = "sum": only "mean"'),
        ({"managed_gradient_accumulation": False}, "only true is supported: the trainer sets the boundaries"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "need masters in fp32"),
        # Optimizers and schedulers.
        ({"optimizer": "AdamW"}, r'optimizer = "AdamW": needs an object'),
        ({"optimizer": {"params": {}}}, r"optimizer\.type: required and missing"),
        ({"optimizer": {"type": "OneBitAdam"}}, r"optimizer\.type = 'OneBitAdam': allowed are Adam, AdamW"),
        ({"optimizer": {"type": "FusedAdam"}}, r"Did you mean 'Adam'\?"),
        ({"optimizer": {"type": "AdamW", "params": {"beta": [0.9, 0.9]}}}, r"params\.beta: AdamW has no .*'betas'\?"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, r"betas = \[0\.9\]: needs two numbers"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": -1}}}, r"optimizer\.params\.lr = -1: .*greater than 0"),
        ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}}, r"Set optimizer\.max_grad_norm in the run"),
        ({"optimizer": {"type": "Lion", "params": {"eps": 1e-8}}}, r"params\.eps: Lion has no such parameter"),
        ({"optimizer": {"type": "SGD", "params": {"dampening": "auto"}}}, r'dampening = "auto": the run config has no'),
        ({"optimizer": {"type": "SGD", "params": {"nesterov": True}}}, "optimizer: Nesterov momentum requires"),
        ({"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 2}}, "has not tested it with ZeRO"),
        ({"scheduler": {"type": "Cosine"}}, r"scheduler\.type = 'Cosine': allowed are WarmupLR, .*, OneCycle"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}}, r"warmup_steps: .* 'warmup_num_steps'\?"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2.5}}}, "positive integer, got 2.5"),
        ({"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": "auto"}}}, r'cycle_min_lr = "auto": the run'),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}, r"optimizer\.warmup_rounds"),
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown is not supported here"),
    ],
)
def test_what_does_not_fit_is_one_line(config_file: Path, template: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        completed(config_file, template)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 3 * 120


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: not JSON"),
        ("{\n  // a comment\n}", r"line 2: not JSON .*no comments"),
        ('{"zero_optimization": {"stage": 2},}', "line 1: not JSON .*no trailing commas"),
        ("zero_optimization:\n  stage: 2\n", "line 1: not JSON"),
        ('{"fp16": {}, "fp16": {}}', "the key 'fp16' appears twice"),
        ('{"gradient_clipping": NaN}', "NaN is no number of JSON"),
        ('{"gradient_clipping": 1e999}', r"gradient_clipping = Infinity: .*finite number"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe{\x00", "not JSON"),
    ],
)
def test_a_file_that_is_no_ds_config(tmp_path: Path, text: str | bytes, message: str) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_ds_config(file)
    with pytest.raises(UserError, match="Is a directory"):
        read_ds_config(tmp_path)


def test_what_is_null_or_switched_off_is_left_out_and_values_get_their_types(config_file: Path) -> None:
    template = {
        "zero_optimization": {
            "stage": "2",
            "offload_optimizer": None,
            "offload_param": None,
            "reduce_bucket_size": 1e8,
        },
        "gradient_clipping": None,
        "wandb": {"enabled": False},
        "amp": {"enabled": "auto", "opt_level": "auto"},
        "activation_checkpointing": {},
        "communication_data_type": "FP32",
    }
    ds_config = completed(config_file, template)
    assert ds_config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 100_000_000, "overlap_comm": False}
    assert (ds_config["gradient_clipping"], ds_config["communication_data_type"]) == (1.0, "fp32")
    assert not ds_config.keys() & {"wandb", "amp", "activation_checkpointing"}
    older = completed(config_file, {"zero_optimization": {"stage": 2, "cpu_offload": True}})
    assert older["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


def test_a_teachers_ds_config_is_checked_alike() -> None:
    for template, message in (
        (
            {"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 1}},
            "Did you mean 'stage3_max_live_parameters'",
        ),
        ({"zero_optimization": True}, "needs an object"),
        ({"zero_optimization": {"stage": 3}, "wandb": {"enabled": True}}, "wandb is not supported"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme_path: required"),
    ):
        with pytest.raises(UserError, match=message):
            frozen_ds_config(template, "bf16", 2, "mine.json")


class _Recorder(dict[str, Any]):
    """A ds_config that remembers for which keys it was asked."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def __copy__(self) -> _Recorder:
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


def test_the_keys_are_those_that_this_version_of_deepspeed_reads() -> None:
    """A key that a new version brings is refused until somebody has decided whose it is."""
    asked = _Recorder({"train_micro_batch_size_per_gpu": 1})
    DeepSpeedConfig(asked)  # type: ignore[no-untyped-call]
    known = [*DsSettings.model_fields, *ELSEWHERE, *FIXED]
    top_level = {key for key in known if "." not in key}
    # Read outside DeepSpeed's config: by its launcher, by zero.Init, by accelerate; and what older versions read.
    others = {"zero3_init_flag", "zero3_save_16bit_model", "sequence_parallel_size", "data_parallel_size"}
    assert asked.asked - top_level == set()
    assert top_level - asked.asked <= others


# ---- layouts and sizes ----


@pytest.mark.parametrize(
    ("world", "given", "filled"),
    [
        (World(0, 0, 16, 8), "auto", 8),
        (World(0, 0, 8, 8), "auto", 1),  # one node: plain ZeRO-3
        (World(0, 0, 4, 1), "auto", 1),
        (World(0, 0, 16, 8), 4, 4),
    ],
)
def test_hierarchical_sharding_follows_the_nodes(config_file: Path, world: World, given: Any, filled: int) -> None:
    template = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": given}}
    ds_config = student_ds_config(template, load_config(None, config_file, []), world, "mine.json")
    assert ds_config["zero_optimization"]["zero_hpz_partition_size"] == filled


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 2, "zero_hpz_partition_size": "auto"}, r"zero_hpz_partition_size = 2 needs stage 3, not 2"),
        ({"stage": 3, "zero_hpz_partition_size": 3}, r"zero_hpz_partition_size = 3 does not divide the 4 ranks"),
        ({"stage": 2, "round_robin_gradients": True}, "round_robin_gradients is not supported here"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, r"ratio = 0\.5: only 1\.0 is supported"),
        (
            {"stage": 3, "mics_shard_size": 2},
            "mics_shard_size is not supported here: .* zero_hpz_partition",
        ),
    ],
)
def test_layouts_that_do_not_fit_are_refused(config_file: Path, zero: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        completed(config_file, {"zero_optimization": zero})


def test_auto_sizes_follow_the_network_and_numbers_stand() -> None:
    shipped = {path.stem: read_ds_config(path) for path in sorted((package_root() / "ds_configs").glob("*.json"))}
    small = NetworkSizes(parameters=16_000_000, trained=8_000_000, largest=300_000, largest_trained=200_000)
    large = NetworkSizes(12 * 10**9, 12 * 10**9, 50_000_000, 50_000_000)
    sizes = fill_sizes(shipped["zero3"], small)["zero_optimization"]
    assert (sizes["reduce_bucket_size"], sizes["stage3_prefetch_bucket_size"]) == (1_000_000, 2_000_000)
    assert sizes["stage3_max_live_parameters"] == sizes["stage3_max_reuse_distance"] == 4_000_000
    sizes = fill_sizes(shipped["zero3"], large)["zero_optimization"]
    assert (sizes["reduce_bucket_size"], sizes["stage3_max_live_parameters"]) == (50_000_000, 10**9)
    adapters = NetworkSizes(parameters=10**9, trained=80_000, largest=10**7, largest_trained=50_000)
    assert fill_sizes(shipped["zero2"], adapters)["zero_optimization"]["reduce_bucket_size"] == 50_000
    swapped = fill_sizes(shipped["zero3_offload_nvme"], adapters)["zero_optimization"]["offload_param"]
    assert swapped["buffer_size"] == 10**7
    own = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}}
    assert fill_sizes(own, large) == own


def test_engines_that_swap_to_nvme_have_folders_of_their_own() -> None:
    """DeepSpeed empties an engine's folder when it is made."""
    shipped = read_ds_config(package_root() / "ds_configs" / "zero3_offload_nvme.json")
    folders = set()
    for name in ("student", "tasks.one.teacher"):
        zero = swapped_apart(shipped, name)["zero_optimization"]
        assert zero["offload_param"]["nvme_path"] == zero["offload_optimizer"]["nvme_path"]
        folders.add(zero["offload_param"]["nvme_path"])
    assert folders == {"/tmp/opd_ds_nvme/student", "/tmp/opd_ds_nvme/tasks.one.teacher"}
    plain = read_ds_config(package_root() / "ds_configs" / "zero3.json")
    assert swapped_apart(plain, "student") == plain


def test_parameters_are_sharded_with_the_networks_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed makes the buffers of what swaps to NVMe when parameters are sharded, and drops an "auto" there."""
    monkeypatch.setattr("opd_ds.engine.sharded_loading.ShardedParameters", lambda ds_config: ds_config)
    shipped = read_ds_config(package_root() / "ds_configs" / "zero3_offload_nvme.json")
    with torch.device("meta"):
        network = torch.nn.Linear(30, 20)
    built: Any = parameter_builder(shipped, torch.device("cpu"), lambda: network)
    assert built["zero_optimization"]["offload_param"]["buffer_size"] == 600
