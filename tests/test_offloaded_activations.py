"""`gradient_checkpointing: offload`: what waits on the host comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opd_ds.config.algorithms import DistilConfig
from opd_ds.engine import Group
from opd_ds.engine.activations import OffloadedActivations
from opd_ds.plan.devices import parse_devices
from opd_ds.plan.memory import Memory, run_memory
from tests.runs import gradients_of
from tests.tiny import costs_of


@pytest.mark.parametrize(
    "changes",
    [{"stage": 0}, {"stage": 2, "student__kind": "lora", "rollout__mode": "fused"}, {"stage": 3, "precision": "bf16"}],
    ids=["stage 0", "stage 2, LoRA, fused", "stage 3, bf16"],
)
def test_the_same_gradients_bit_for_bit(
    configured: Callable[..., DistilConfig],
    sgd: Callable[[int], str],
    group: Group,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    seen: list[Tensor] = []
    made = OffloadedActivations.__init__

    def counting(self: OffloadedActivations, network: nn.Module) -> None:
        made(self, network)
        give = self.unpack_hook
        self.unpack_hook = lambda kept: (isinstance(kept, tuple) and seen.append(kept[1]), give(kept))[1]

    monkeypatch.setattr(OffloadedActivations, "__init__", counting)
    settings = {key: value for key, value in changes.items() if key != "stage"}
    settings |= {"deepspeed": sgd(changes["stage"]), "optimizer": {"lr": 1.0, "max_grad_norm": 0.0}}
    wanted = gradients_of(configured(**settings, student__gradient_checkpointing=True), group)
    assert not seen
    found = gradients_of(configured(**settings, student__gradient_checkpointing="offload"), group)
    assert seen
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_weights_stay_where_they_are() -> None:
    network, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4, requires_grad=True)
    with (hooks := OffloadedActivations(network)):
        weight, activation = network[0].weight, network(x)
        assert hooks.pack_hook(weight.detach()).data_ptr() == weight.data_ptr()
        assert hooks.pack_hook(activation)[0] == torch.device("cpu")
    wanted = torch.autograd.grad(network(x).sum(), [x, *network.parameters()])
    found = torch.autograd.grad(activation.sum(), [x, *network.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


def test_inputs_of_checkpointed_blocks_wait_on_the_host() -> None:
    block, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4, requires_grad=True)
    hooks, packed = OffloadedActivations(block), list[int]()
    keep = hooks.pack_hook
    hooks.pack_hook = lambda tensor: (packed.append(tensor.data_ptr()), keep(tensor))[1]
    with hooks:
        block_input = 2 * x
        checkpoint(block, block_input, use_reentrant=False)
    assert packed == [block_input.data_ptr()]


def test_the_plan_moves_them_to_the_host(configured: Callable[..., DistilConfig]) -> None:
    devices = parse_devices("1xA100-40GB", "--gpus")
    costs = costs_of(configured(student__gradient_checkpointing=True))

    def memory(how: bool | str) -> Memory:
        return run_memory(configured(student__gradient_checkpointing=how), costs, devices)

    def of(parts: list[Any]) -> float:
        return sum(part.nbytes for part in parts if part.name.startswith("activations"))

    plain, offloaded = memory(True), memory("offload")
    assert of(plain.host) == 0 < of(offloaded.host)
    assert of(offloaded.device) < of(plain.device)
