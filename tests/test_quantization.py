"""Frozen weights in 8 or 4 bits: what they weigh, what they compute, and a run on them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.schema import RunConfig
from opd_ds.engine import Alone, Group
from opd_ds.errors import UserError
from opd_ds.models import lora, quantization
from opd_ds.models.quantization import QuantizedLinear, saved_bytes, stored_tensors
from opd_ds.plan.devices import parse_devices
from opd_ds.plan.memory import run_memory
from opd_ds.plan.planner import settings
from opd_ds.runs.preflight import preflight
from opd_ds.runs.setup import Parts
from opd_ds.runs.train import train
from opd_ds.testing import family_checks as checks
from tests.ranks import launch
from tests.runs import assert_close, metrics
from tests.tiny import costs_of, run_settings, write_config

pytest.importorskip("torchao", reason="pip install 'opd-ds[quantization]'")

KINDS = ("int8", "fp8", "nf4")
LORA = {"student__kind": "lora", "precision": "bf16", "deepspeed": "zero2"}
Build = Callable[..., tuple[RunConfig, Parts]]


def quantized(network: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, QuantizedLinear)}


def bytes_of(network: nn.Module) -> int:
    tensors = [*network.parameters(), *network.buffers()]
    plain = [part for one in tensors for part in (stored_tensors(one) if hasattr(one, "__tensor_flatten__") else [one])]
    return sum(tensor.nbytes for tensor in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_network_is_smaller_and_nearly_the_same(tiny_world: Path, dtype: torch.dtype) -> None:
    family = checks.build("sd3", tiny_world / "base", dtype)
    whole, x, sigma = family.load_transformer(), checks.noise(family).draw(slice(None)), torch.full((4,), 0.6)
    (cond, _), errors = checks.encode(family, checks.PROMPTS), {}
    wanted = family.velocity(whole, x, sigma, cond).float()
    for kind in KINDS:
        network = family.load_transformer(quantize=kind)
        layers = quantized(network)
        assert layers
        assert all(name.startswith("transformer_blocks.") for name in layers)
        assert not any(name.removesuffix(".weight") in layers for name, _ in network.named_parameters())
        tables = sum(
            table.nbytes
            for layer in layers.values()
            for name in ("qmap", "nf4")
            if (table := getattr(layer.weight, name, None)) is not None
        )
        assert bytes_of(network) - tables == pytest.approx(bytes_of(whole) - saved_bytes(whole, kind), rel=0.01)
        found = family.velocity(network, x, sigma, cond).float()
        errors[kind] = float((found - wanted).norm() / wanted.norm())
    assert 0 < errors["int8"] < errors["fp8"] < errors["nf4"] < 0.3, errors


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_weight_as_it_is_stored_and_nothing_of_it_is_kept(
    tiny_world: Path, kind: Any
) -> None:
    network = checks.build("sd3", tiny_world / "base", torch.float32).load_transformer(quantize=kind)
    layer = next(iter(quantized(network).values()))
    plain = nn.Linear(layer.in_features, layer.out_features)
    eye = torch.eye(layer.in_features)
    with torch.no_grad():
        assert layer.bias is not None
        plain.bias.copy_(layer.bias)
        plain.weight.copy_((layer(eye) - layer.bias).T)
    x, kept = torch.randn(3, 5, layer.in_features, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda one: one):
        found = layer(x)
    wanted = plain(x)
    torch.testing.assert_close(found, wanted)
    ours, theirs = (torch.autograd.grad(out.square().sum(), x)[0] for out in (found, wanted))
    torch.testing.assert_close(ours, theirs)
    assert plain.weight.shape not in kept


def test_weights_with_one_scale_are_nf4_too() -> None:
    """Scales are stored by their distance from their mean, which is 0 here."""
    layer, x = nn.Linear(64, 64, bias=False), torch.randn(2, 64)
    for value in (0.0, 0.5):
        nn.init.constant_(layer.weight, value)
        wanted = layer(x)
        quantization._quantize(copied := copy.deepcopy(layer), "nf4")
        assert isinstance(copied, QuantizedLinear)
        torch.testing.assert_close(copied(x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_student_learns_on_a_quantized_base(build_run: Build, kind: str) -> None:
    _, parts = build_run(**LORA, student__quantize=kind)
    names = {name for name, _ in parts.student.module.named_parameters()}
    assert quantized(parts.student.module)
    before = parts.student.gather_weights(trainable_only=True)
    reports = [parts.trainer.run_round(index) for index in range(2)]
    after = parts.student.gather_weights(trainable_only=True)
    assert all(report.grad_norm > 0 for report in reports)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert before.keys() <= names


@pytest.mark.parametrize("checkpointing", [True, "offload"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_learn_the_same(
    build_run: Build, monkeypatch: pytest.MonkeyPatch, kind: str, checkpointing: bool | str
) -> None:
    """What dynamo makes of them, run as it is: machine code takes minutes."""
    made = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        made.append(torch.is_grad_enabled())
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    changes = LORA | {"precision": "fp32", "rollout__steps": 2, "rollout__samples": 2, "rollout__guidance": 1.0}
    changes |= {"student__gradient_checkpointing": checkpointing}
    found = []
    for compiled in (False, True):
        _, parts = build_run(**changes, student__quantize=kind, model__compile_blocks=compiled)
        reports = [parts.trainer.run_round(index) for index in range(2)]
        found.append([(report.losses.loss, report.grad_norm) for report in reports])
        assert bool(made) == compiled
    assert any(made)
    torch._dynamo.reset()
    assert found[1] == [pytest.approx(numbers, rel=1e-4) for numbers in found[0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes", [{"deepspeed": "zero0", "precision": "fp32"}, {"deepspeed": "zero1"}, {"rollout__mode": "fused"}]
)
def test_a_student_that_starts_as_its_teacher_has_loss_zero(
    build_run: Build, tiny_world: Path, kind: str, changes: dict[str, Any]
) -> None:
    """The teacher stands on the same quantized base; exactly."""
    teacher = {"path": str(tiny_world / "adapter"), "guidance": 2.0}
    tasks = {"self": {"teacher": teacher, "prompts": str(tiny_world / "prompts.txt")}}
    start = str(tiny_world / "adapter")
    _, parts = build_run(**LORA | changes, student__quantize=kind, student__start=start, tasks=tasks)
    report = parts.trainer.run_round(0)
    assert (report.losses.loss, report.grad_norm) == (0.0, 0.0)


def test_a_run_resumes_bit_for_bit_and_exports_a_plain_lora(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    def run(name: str, resume: str = "never", **changes: Any) -> Path:
        changes = LORA | {"student__quantize": "int8", "run__checkpoint_every": 2} | changes
        config = DistilConfig.model_validate(run_settings(tiny_world, tmp_path / name, **changes))
        train(config, group, resume)
        return tmp_path / name

    once = run("once")
    middle = str(once / "checkpoints" / "round-000002")
    again = run("again", middle)
    assert metrics(again)[-1] == metrics(once)[-1]
    exported, resumed = (load_file(folder / "export" / "pytorch_lora_weights.safetensors") for folder in (once, again))
    assert exported.keys() == resumed.keys()
    assert all(torch.equal(exported[key], resumed[key]) for key in exported)
    network = checks.build("sd3", tiny_world / "base", torch.float32).load_transformer()
    lora.load_adapter(network, "exported", once / "export")
    with pytest.raises(UserError, match=r"student\.quantize was 'int8' and is now 'nf4'"):
        run("other", middle, student__quantize="nf4")


def test_a_quantized_teacher_teaches_nearly_the_same(build_run: Build, tiny_world: Path) -> None:
    def taught(quantize: str | None) -> float:
        prompts = str(tiny_world / "prompts.txt")
        paths = {"one": tiny_world / "other", "two": tiny_world / "adapter"}
        tasks = {
            name: {"teacher": {"path": str(path), "quantize": quantize}, "prompts": prompts}
            for name, path in paths.items()
        }
        _, parts = build_run(tasks=tasks)
        return parts.trainer.run_round(0).losses.loss

    whole = taught(None)
    assert 0 < abs(taught("fp8") - whole) < 0.2 * whole


@pytest.mark.multirank
def test_two_ranks_learn_what_one_does(tiny_world: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        changes = LORA | {"precision": "fp32", "student__quantize": "nf4"}
        data = run_settings(tiny_world, tmp_path / f"{ranks}", **changes)
        launch(ranks, "--config", str(write_config(tmp_path / f"{ranks}.yaml", data)))
        found.append(metrics(tmp_path / f"{ranks}"))
    assert_close(*found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student__quantize": "int8"}, r"quantize = 'int8' is for weights that are not trained"),
        ({"student__kind": "lora", "student__quantize": "int8"}, r"stage = 3 with student\.quantize = 'int8'"),
        ({"student__kind": "lora", "student__quantize": "int2"}, r"student\.quantize"),
        ({"tasks__one__teacher__quantize": "nf4", "tasks__one__teacher__placement": "offload"}, "cannot be moved"),
        ({"tasks__one__teacher__quantize": "nf4", "tasks__one__teacher__placement": "shared"}, "set student.quantize"),
        ({**LORA, "student__quantize": "nf4", "model__compile_blocks": True}, "keeps its weights whole"),
    ],
)  # fmt: skip
def test_what_cannot_be(tiny_world: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        preflight(DistilConfig.model_validate(run_settings(tiny_world, tmp_path, **changes)), Alone(), World(), None)


def test_without_torchao_a_run_is_refused(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    config = DistilConfig.model_validate(run_settings(tiny_world, tmp_path, **LORA, student__quantize="fp8"))
    with pytest.raises(
        UserError, match=r"student\.quantize = 'fp8' needs torchao: pip install 'opd-ds\[quantization\]'"
    ):
        preflight(config, Alone(), World(), None)


def test_the_plan_counts_the_bits(configured: Callable[..., DistilConfig]) -> None:
    devices, costs = parse_devices("1xA100-40GB", "--gpus"), costs_of(configured(**LORA))
    saved = saved_bytes(costs.model.network(), "nf4")
    assert saved > 0

    def weights(**changes: Any) -> dict[str, float]:
        return {part.name: part.nbytes for part in run_memory(configured(**LORA, **changes), costs, devices).device}

    plain = weights()
    assert plain["student weights"] - weights(student__quantize="nf4")["student weights"] == saved
    assert plain["teachers"] - weights(tasks__one__teacher__quantize="nf4")["teachers"] == saved
    searched = settings(configured(**LORA, student__quantize="nf4"), devices)
    assert {setting.deepspeed for setting in searched} == {"zero1", "zero2"}
