"""Blocks as units of ZeRO-3: the same gradients with fewer hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_full_grad
from peft import LoraConfig
from torch import Tensor, nn

from opd_ds.engine import Group, StudentEngine
from opd_ds.models import lora
from opd_ds.plan.inputs import network_inputs
from tests.tiny import TARGETS

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}
KINDS = ["full", "lora"]


@pytest.fixture
def student(tiny_world: Path) -> Callable[..., nn.Module]:
    def build(kind: str, *, recompute: bool) -> nn.Module:
        network = diffusers.SD3Transformer2DModel.from_pretrained(tiny_world / "base", subfolder="transformer")
        if recompute:
            network.enable_gradient_checkpointing()
        if kind == "lora":
            torch.manual_seed(0)
            lora.new_adapter(network, "x", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
        return network.train()

    return build


def inputs(network: nn.Module) -> dict[str, Any]:
    made = network_inputs("SD3Transformer2DModel", network.config, (4, 8, 8), 2, 20, torch.float32)
    torch.manual_seed(1)
    return {key: torch.randn(x.shape) if isinstance(x, Tensor) else x for key, x in made.items()}


def loss_of(forward: Any, given: dict[str, Any], forwards: int) -> Tensor:
    outputs = [forward(**given | {"timestep": given["timestep"] + index})[0] for index in range(forwards)]
    return sum((output.square().mean() for output in outputs), start=torch.zeros(()))


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_plain_network(
    kind: str, recompute: bool, forwards: int, student: Callable[..., nn.Module], group: Group
) -> None:
    plain = student(kind, recompute=recompute)
    given = inputs(plain)
    loss_of(plain, given, forwards).backward()
    engine = StudentEngine(student(kind, recompute=recompute), DS_CONFIG, group, "per_layer")
    expected = {name: value.grad for name, value in plain.named_parameters() if value.requires_grad}
    for micro_batches in (1, 2):  # in the second DeepSpeed adds to what it has
        engine.accumulate(loss_of(engine, given, forwards), last=False)
        found = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters() if p.requires_grad}
        for name, gradient in expected.items():
            assert gradient is not None
            torch.testing.assert_close(found[name], micro_batches * gradient, rtol=1e-5, atol=1e-7)


def test_a_block_is_gathered_at_once(
    student: Callable[..., nn.Module], group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[nn.Module] = []
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def count(self: Any, module: nn.Module, forward: bool) -> None:
        asked.append(module)
        fetch(self, module, forward)

    monkeypatch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", count)
    engine = StudentEngine(student("full", recompute=False), DS_CONFIG, group, "per_layer")
    engine(**inputs(engine.module))
    blocks = engine.module.transformer_blocks
    assert all(block in asked for block in blocks)
    assert not any(module in asked for block in blocks for module in list(block.modules())[1:])
