"""The plan of a run: memory by hand, measured passes. Known models: tests/test_plan_models.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.full_size import FullSize, cases
from benchmarks.plan_memory import bench
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import load_config
from opd_ds.config.schema import RunConfig
from opd_ds.errors import UserError
from opd_ds.models import Conditioning
from opd_ds.models.lora import PEFT_WEIGHTS
from opd_ds.models.sd3 import SD3
from opd_ds.plan.devices import Devices, parse_devices
from opd_ds.plan.inputs import network_inputs, squared_sum
from opd_ds.plan.memory import Memory, batches, buffer_bytes, run_memory
from opd_ds.plan.metering import forward_cost, training_cost
from opd_ds.plan.network import Counts, Model, count, find_model
from opd_ds.plan.planner import make_plan
from opd_ds.plan.zero import Part, Phase, Zero, frozen_weights, student_state
from opd_ds.runs.setup import Parts
from opd_ds.training.buffer import PerPair, PerState, TrajectoryBuffer
from tests.tiny import ALL_SHARDED, costs_of

Build = Callable[..., tuple[RunConfig, Parts]]

# ---- passes, measured without data ----


def test_metered_bytes_are_those_that_a_real_forward_saves(tiny_world: Path) -> None:
    network = diffusers.SD3Transformer2DModel.from_pretrained(tiny_world / "base", subfolder="transformer")
    with torch.device("meta"):
        empty = diffusers.SD3Transformer2DModel.from_config(network.config)
    inputs = network_inputs("SD3Transformer2DModel", network.config, (4, 8, 8), 3, 20, torch.float32)
    real = {key: torch.randn(value.shape) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    known = {tensor.untyped_storage().data_ptr() for tensor in [*network.parameters(), *network.buffers()]}
    known |= {value.untyped_storage().data_ptr() for value in real.values() if isinstance(value, Tensor)}
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(**real)[0]
    keep(output)
    counted = sum(storage.nbytes() for address, storage in saved.items() if address not in known)
    assert training_cost(empty, inputs, squared_sum).saved == counted
    empty.enable_gradient_checkpointing()
    assert training_cost(empty, inputs, squared_sum).saved < counted / 2


class _Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        heads = self.project(x).unflatten(-1, (2, 16)).transpose(1, 2)
        return (functional.scaled_dot_product_attention(heads, heads, heads),)


def test_work_and_peak_of_a_network_by_hand() -> None:
    batch, rows = 3, 64
    with torch.device("meta"):
        network, x = _Attending(), torch.empty(batch, rows, 32)
    linear, attention = 2 * batch * rows * 32 * 32, 2 * 2 * batch * 2 * rows * rows * 16
    forward = forward_cost(network, {"x": x})
    assert forward.flops == linear + attention
    tensor = batch * rows * 32 * 4
    assert forward.peak == 2 * tensor + batch * 2 * rows * 4  # projected, attended, a number per row; no matrix
    # Of the input no gradient is asked; attention's backward computes its matrix once more and has four products.
    assert training_cost(network, {"x": x}, squared_sum).flops == 2 * linear + attention + attention * 5 / 2


def test_costs_between_measured_batches_are_those_of_the_batch(configured: Callable[..., DistilConfig]) -> None:
    config = configured()
    costs = costs_of(config)
    inputs = network_inputs(
        "SD3Transformer2DModel", costs.model.configs["transformer"], (4, 8, 8), 5, 20, torch.float32
    )
    measured = training_cost(costs.network, inputs, squared_sum)
    line = costs.train(5, checkpointing=False)
    assert line.flops == measured.flops
    assert line.peak == pytest.approx(measured.peak, rel=0.01)


def test_sd3s_inputs_are_the_familys(tiny_world: Path) -> None:
    family = SD3(tiny_world / "base", dtype=torch.float32, device=torch.device("cpu"), max_text_length=10)
    taken: dict[str, Any] = {}

    def network(**inputs: Any) -> tuple[Tensor]:
        taken.update(inputs)
        return (inputs["hidden_states"],)

    cond: Conditioning = family.encode(["a", "b"])
    family.velocity(network, torch.zeros(2, *family.latent_shape), torch.ones(2), cond)
    config = json.loads((tiny_world / "base" / "transformer" / "config.json").read_text())
    ours = network_inputs("SD3Transformer2DModel", config, family.latent_shape, 2, 20, torch.float32)
    assert ours.keys() == taken.keys()
    for key, value in taken.items():
        if isinstance(value, Tensor):
            assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype)


# ---- memory ----

COUNTS = Counts(trained=1000, frozen=200, buffers=10, largest=300, small=40)


def sizes(parts: list[Part], phase: Phase) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in parts:
        if part.alive(phase):
            found[part.name] = found.get(part.name, 0) + part.nbytes
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("stage", "precision", "weights", "masters", "gradients"),
    [
        (0, "fp32", 4 * 1210, 0, 4 * 1000),
        (0, "bf16", 2 * 1210, 4 * 1000, 2 * 1000),
        (1, "fp32", 4 * 1210, "4/W", 4 * 1000),
        (1, "bf16", 2 * 1210, "4/W", (2 + 4) * 1000),
        (2, "fp32", 4 * 1210, "4/W", "4/W"),
        (2, "bf16", 2 * 1210, "4/W", "4/W"),
        (2, "fp16", 2 * 1210, "4/W", "2/W"),
        (3, "fp32", None, "4/W", "4/W"),
        (3, "bf16", None, "4/W", "4/W"),
    ],
)
def test_state_by_hand(
    stage: int, precision: str, weights: float | None, masters: Any, gradients: Any, world: int
) -> None:
    def of(value: Any) -> float:
        return int(value[0]) * 1000 / world if isinstance(value, str) else value

    element = 4 if precision == "fp32" else 2
    zero = Zero(stage, world, reduce_bucket=100, prefetch=100, max_live=500, reuse=10**9)
    state = student_state(COUNTS, precision, element, zero, copies=2, on_cpu=False)
    found = sizes(state.device, Phase.TRAIN)
    if weights is None:
        shard = 1200 / world
        weights = element * (shard + (40 if world > 1 else 0) + 10)
        # Used again within a long way, weights stay until the backward; what is on its way is there twice.
        live = shard * world - 40 + 100 if world > 1 else 0
        assert found.get("student weights: gathered", 0) == element * live
    share = 1000 if stage == 0 else 1000 / world
    assert found["student weights"] == weights
    assert found["fp32 masters"] == of(masters)
    assert found["optimizer state"] == 8 * share
    assert found["weight copies"] == 2 * 4 * share
    assert found["gradients"] == of(gradients)
    assert not state.host


def test_offload_moves_state_to_the_host() -> None:
    zero = Zero(3, 2, offload_optimizer=True, offload_param=True, reduce_bucket=100)
    state = student_state(COUNTS, "bf16", 2, zero, copies=1, on_cpu=False)
    assert sizes(state.device, Phase.STEP)["student weights"] == 2 * (40 + 10)
    host = sizes(state.host, Phase.STEP)
    assert host["student weights (offloaded)"] == 2 * 600
    assert host["fp32 masters"] + host["optimizer state"] + host["weight copies"] == (4 + 8 + 4) * 500


def teachers_in(memory: Memory, phase: Phase) -> float:
    return sum(part.nbytes for part in memory.device if part.name.startswith("teachers") and part.alive(phase))


def test_teachers_by_placement(configured: Callable[..., DistilConfig], tiny_world: Path, tmp_path: Path) -> None:
    gpu = parse_devices("2xH100-80GB", "--gpus")
    both = {"tasks__one__teacher__path": str(tiny_world / "adapter2")}
    config = configured(**both, deepspeed="zero2")
    costs = costs_of(config)
    base = 4 * (costs.base().parameters + costs.base().buffers)
    files = [load_file(tiny_world / name / PEFT_WEIGHTS) for name in ("adapter", "adapter2")]
    adapters = sum(4 * value.numel() for file in files for value in file.values())
    resident = run_memory(config, costs, gpu)
    assert teachers_in(resident, Phase.TRAIN) == base + adapters  # one base for two LoRAs

    def placed(where: str) -> Memory:
        changes = {f"tasks__{task}__teacher__placement": where for task in ("one", "two")}
        return run_memory(configured(**both, deepspeed="zero2", **changes), costs, gpu)

    offload = placed("offload")
    assert teachers_in(offload, Phase.TRAIN) == 0
    assert teachers_in(offload, Phase.SCORE) == base + adapters
    assert sum(part.nbytes for part in offload.node) == base + adapters
    two_checkpoints = both | {f"tasks__{task}__teacher__placement": "offload" for task in ("one", "two")}
    two_checkpoints |= {
        "tasks__one__teacher__path": str(tiny_world / "other"),
        "tasks__two__teacher__path": str(tiny_world / "base"),
    }
    one_after_the_other = run_memory(configured(**two_checkpoints, deepspeed="zero2"), costs, gpu)
    assert teachers_in(one_after_the_other, Phase.SCORE) == base
    assert teachers_in(one_after_the_other, Phase.ROLLOUT) == 0
    assert sum(part.nbytes for part in one_after_the_other.node) == 2 * base
    assert (
        one_after_the_other.host_peak(2) - one_after_the_other.host_peak(1)
        == one_after_the_other.host_peak(1) - 2 * base
    )
    drawing = run_memory(configured(**two_checkpoints, deepspeed="zero2", objective={"method": "sft"}), costs, gpu)
    assert teachers_in(drawing, Phase.ROLLOUT) == base
    assert teachers_in(drawing, Phase.SCORE) == 0
    streamed = placed("stream")
    assert teachers_in(streamed, Phase.SCORE) == 4 * (costs.streamed + costs.base().buffers)
    assert sum(part.nbytes for part in streamed.node) == base + adapters
    # LoRAs beside a LoRA student stand in its network.
    lora = both | {"student__kind": "lora"}
    for deepspeed in ("zero2", "zero3"):  # ZeRO-3 keeps what is that small whole
        shared = run_memory(configured(**lora, deepspeed=deepspeed), costs, gpu)
        assert teachers_in(shared, Phase.TRAIN) == adapters
    separate = lora | {f"tasks__{task}__teacher__placement": "resident" for task in ("one", "two")}
    assert (
        teachers_in(run_memory(configured(**separate, deepspeed="zero2"), costs, gpu), Phase.TRAIN) == base + adapters
    )
    # At the default threshold every parameter of the tiny model stays whole on every rank.
    sharding = tmp_path / "sharding.json"
    sharding.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    both |= {f"tasks__{task}__teacher__deepspeed": str(sharding) for task in ("one", "two")}
    buffers = 4 * costs.base().buffers
    assert teachers_in(placed("zero_inference"), Phase.TRAIN) == (base + adapters - buffers) / 2 + buffers


def test_where_teachers_draw_the_students_weights_are_not_gathered_for_it(
    configured: Callable[..., DistilConfig],
) -> None:
    gpu = parse_devices("2xH100-80GB", "--gpus")

    def there(phase: Phase, method: str) -> float:
        config = configured(deepspeed=ALL_SHARDED, objective={"method": method}, rollout__gather="per_layer")
        parts = run_memory(config, costs_of(config), gpu).device
        return sum(part.nbytes for part in parts if part.name == "student weights: gathered" and part.alive(phase))

    assert there(Phase.ROLLOUT, "sft") == 0 < there(Phase.ROLLOUT, "closed_form")
    assert there(Phase.EVALUATE, "sft") == there(Phase.EVALUATE, "closed_form") > 0


@pytest.mark.parametrize(
    "objective",
    [{}, {"extrapolation": 0.25}, {"guided": "apart", "extrapolation": 0.25}, {"method": "ppo"}, {"method": "sft"}],
    ids=str,
)
def test_the_buffers_bytes_are_those_of_the_real_buffer(
    objective: dict[str, Any], build_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"objective": objective, "rollout__trained_steps": {"steps": [0, 2]}}
    if "guided" in objective:
        changes["tasks__one__teacher__guidance"] = 2.0
    if objective.get("method") == "ppo":
        changes |= {"rollout__kernel": "flow", "rollout__noise_level": 0.7}
    config, parts = build_run(**changes)
    seen: dict[str, float] = {"states": 0, "scored": 0}
    places: tuple[tuple[type, str, str], ...] = (
        (TrajectoryBuffer, "states", "states"),
        (PerState, "values", "states"),
        (PerPair, "values", "scored"),
    )
    for kind, field, name in places:

        def made(self: Any, *values: Any, _init: Any = kind.__init__, _field: str = field, _name: str = name) -> None:
            _init(self, *values)
            seen[_name] += getattr(self, _field).nbytes

        monkeypatch.setattr(kind, "__init__", made)
    parts.trainer.run_round(0)
    assert buffer_bytes(config, find_model(config), parse_devices("1xcpu", "--gpus")) == seen


# ---- devices and the search ----


def test_larger_batches_need_more_and_sharding_needs_less(configured: Callable[..., DistilConfig]) -> None:
    costs = costs_of(configured())
    devices = parse_devices("4xH100-80GB", "--gpus")

    def needed(**changes: Any) -> float:
        return make_plan(configured(deepspeed="zero2", **changes), costs, devices).memory.in_phase(Phase.TRAIN)

    assert needed(train__micro_batch=2) < needed(train__micro_batch=4)
    assert needed(student__gradient_checkpointing=True) < needed()
    assert batches(configured(), devices) == {"rollout": 4, "score": 8, "train": 8, "evaluate": 32}


def test_streamed_blocks_are_two_of_them() -> None:
    """SD3.5-Medium: 24 blocks, and little beside them."""
    costs = costs_of(load_config("mopd_sd35m", None, []))
    assert 2 / 24 < costs.streamed / costs.base().parameters < 0.15


def test_whole_weights_are_there_for_rollouts_where_they_fit(configured: Callable[..., DistilConfig]) -> None:
    config = configured(deepspeed=ALL_SHARDED)
    costs, devices = costs_of(config), parse_devices("4xH100-80GB", "--gpus")

    def whole(devices: Devices, phase: Phase, **changes: Any) -> float:
        memory = make_plan(configured(**{"deepspeed": ALL_SHARDED} | changes), costs, devices).memory
        return sum(part.nbytes for part in memory.device if part.name.endswith("whole") and part.alive(phase))

    counts = costs.student()
    element = 4 if config.precision == "fp32" else 2
    assert whole(devices, Phase.ROLLOUT) == element * counts.parameters
    assert whole(devices, Phase.TRAIN) == 0
    assert whole(devices, Phase.ROLLOUT, rollout__gather="per_layer") == 0
    tight = replace(devices, kind=replace(devices.kind, memory=element * counts.parameters))
    assert whole(tight, Phase.ROLLOUT) == 0
    assert whole(tight, Phase.ROLLOUT, rollout__gather="once") > 0
    assert whole(devices, Phase.ROLLOUT, rollout__gather="once", deepspeed="zero3_offload_nvme") == 0


def test_a_ds_config_is_read_with_deepspeeds_defaults() -> None:
    assert Zero.of({"zero_optimization": {"stage": 2, "overlap_comm": True}}, 4).buffers == 2
    read = Zero.of({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 7}}, 4)
    assert (read.stage, read.max_live, read.world, read.offload_param) == (3, 7, 4, False)


def test_models_are_the_same_from_a_folder(configured: Callable[..., DistilConfig], tiny_world: Path) -> None:
    model: Model = find_model(configured())
    real = diffusers.SD3Transformer2DModel.from_pretrained(tiny_world / "base", subfolder="transformer")
    found = count(model.network())
    assert found.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert found.buffers == sum(buffer.numel() for buffer in real.buffers())
    assert model.tokens == 10 + 10


def test_loss_of_parts_is_one_number() -> None:
    assert squared_sum(([torch.ones(2), torch.ones(3)],)).item() == 5.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kind", "teachers"),
    [
        ("stable-diffusion-3.5-medium", "lora", "full"),
        ("stable-diffusion-3.5-medium", "full", "lora"),
        ("FLUX.1-dev", "lora", "lora"),
        ("FLUX.2-klein-4B", "lora", "lora"),
        ("Qwen-Image", "lora", "lora"),
        ("Z-Image", "lora", "lora"),
        ("Wan2.1-T2V-1.3B-Diffusers", "full", "full"),
    ],
)
def test_a_round_at_true_width_takes_what_the_plan_says(tmp_path: Path, model: str, kind: str, teachers: str) -> None:
    """One block of each kind."""
    bench(tmp_path, print, [FullSize(model, 1, kind, teachers)])
    (row,) = json.loads((tmp_path / "plan.json").read_text())
    assert abs(row["error"]) < 0.15
    assert f"| {model} | 1 | {kind} | {teachers} |" in (tmp_path / "plan.md").read_text()


def test_a_model_that_no_true_width_is_known_of() -> None:
    with pytest.raises(UserError, match=r"--model FLUX1-dev: unknown; allowed: .*Did you mean 'FLUX\.1-dev'"):
        cases(["FLUX1-dev"], 1, 1)


def test_one_device_gathers_what_stands_on_its_host() -> None:
    """Without offload the shard of a single rank is the parameter; from the host it has to come."""

    def gathered(zero: dict[str, Any]) -> float:
        plan = frozen_weights(COUNTS, 2, Zero.of({"zero_optimization": {"stage": 3, **zero}}, 1), {Phase.SCORE})
        return sum(part.nbytes for part in plan.device if "gathered" in part.name)

    assert gathered({}) == 0
    assert gathered({"offload_param": {"device": "cpu"}}) > 0
