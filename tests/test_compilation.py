"""Blocks through `torch.compile`: what dynamo makes of them. Machine code takes minutes: its test is slow."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch._dynamo.utils import clear_compilation_metrics, counters

from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.engine import Group, StudentEngine
from opd_ds.errors import UserError
from opd_ds.models import CompilationLog, compile_blocks
from opd_ds.plan.inputs import network_inputs
from opd_ds.runs.files import find_files
from tests.test_blocks import DS_CONFIG
from tests.test_round import FEW, Build, own_teacher
from tests.tiny import run_settings, write_lora


@pytest.fixture
def with_gradient(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each graph that dynamo makes, which is run as it is: whether it is one of training."""
    made = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        made.append(torch.is_grad_enabled())
        return graph.forward

    yield from _compiling_by(backend, made, monkeypatch)


@pytest.fixture
def differentiated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are differentiated as for machine code, and run as they are."""
    yield from _compiling_by("aot_eager", None, monkeypatch)


def _compiling_by(backend: Any, given: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Dynamo's limits and counts are as they were afterwards."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    _forget()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield given
    _forget()


def _forget() -> None:
    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()


@pytest.mark.extended
@pytest.mark.parametrize("gather", [None, "once", "per_layer"])
def test_compiled_blocks_make_the_same_rounds(
    build_run: Build, tiny_world: Path, with_gradient: list[bool], gather: str | None
) -> None:
    """Without ZeRO, and under ZeRO-3 with a teacher under it as well, recomputed in the backward; once from inputs that
    wait on the host.
    """
    recomputed = "offload" if gather == "once" else True
    placement = "resident" if gather is None else "zero_inference"
    teacher = own_teacher(tiny_world, path=str(tiny_world / "other"), guidance=1.0, placement=placement)
    changes: dict[str, Any] = {"tasks": {"one": teacher}, "student__gradient_checkpointing": recomputed}
    changes |= FEW | {"rollout__guidance": 1.0}
    changes |= {"deepspeed": "zero0"} if gather is None else {"rollout__gather": gather}
    changes["student__kind"] = "lora" if gather == "per_layer" else "full"
    found = []
    for compiled in (False, True):
        _, parts = build_run(model__compile_blocks=compiled, **changes)
        found.append([parts.trainer.run_round(index).losses.loss for index in range(2)])
        assert any(with_gradient) == compiled
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert not counters["graph_break"]


def _network() -> nn.Module:
    """Of one block."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2}
    widths = {"joint_attention_dim": 8, "caption_projection_dim": 8, "pooled_projection_dim": 8, "out_channels": 4}
    made = diffusers.SD3Transformer2DModel(**sizes, **widths, patch_size=2, in_channels=4, pos_embed_max_size=16)
    return made.train()


def _inputs(network: nn.Module, rows: int, side: int = 8) -> dict[str, Any]:
    torch.manual_seed(rows)
    made = network_inputs("SD3Transformer2DModel", network.config, (4, side, side), rows, 6, torch.float32)
    return {key: torch.randn(x.shape) if isinstance(x, Tensor) else x for key, x in made.items()}


def _saved(loss: Tensor) -> list[Tensor]:
    """What compiled code keeps for its backward."""
    found, seen, waiting = [], set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
        if "CompiledFunction" in type(node).__name__:
            found += node.saved_tensors
    return found


def test_under_zero3_a_graph_takes_any_number_of_rows_and_keeps_no_weights(differentiated: None, group: Group) -> None:
    """One graph for all micro-batches, gradients as without; what it keeps of weights are parameters, which DeepSpeed
    empties, and no views of what was gathered.
    """
    plain = _network()
    network = copy.deepcopy(plain)
    compile_blocks(network)
    engine = StudentEngine(network, DS_CONFIG, group, "per_layer")
    (block,) = network.transformer_blocks
    gathered: set[int] = set()

    def note(module: nn.Module, *_: Any) -> None:
        gathered.update(parameter.untyped_storage().data_ptr() for parameter in module.parameters())

    block.register_forward_hook(note, prepend=True)
    for rows in (2, 3, 5):
        given = _inputs(plain, rows)
        plain(**given)[0].square().mean().backward()
        gathered.clear()
        loss = engine(**given)[0].square().mean()
        weights = [value for value in _saved(loss) if isinstance(value, nn.Parameter)]
        others = [value for value in _saved(loss) if not isinstance(value, nn.Parameter)]
        assert weights
        assert not gathered & {value.untyped_storage().data_ptr() for value in others}
        engine.accumulate(loss, last=False)
        assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for name, parameter in engine.module.named_parameters():
        if (expected := plain.get_parameter(name).grad) is not None:
            torch.testing.assert_close(safe_get_full_grad(parameter), expected, rtol=1e-4, atol=1e-7)


def test_a_second_size_makes_a_graph_for_all_further_sizes_and_a_single_row_one(with_gradient: list[bool]) -> None:
    network = _network()
    compile_blocks(network)
    graphs = []
    for rows, side in ((2, 8), (3, 12), (2, 10), (5, 8), (1, 8)):
        network(**_inputs(network, rows, side))
        graphs.append(len(with_gradient))
    assert graphs == [1, 2, 2, 2, 3]


@pytest.mark.extended
def test_training_is_compiled_beside_three_adapters(
    build_run: Build, tiny_world: Path, with_gradient: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    """A LoRA student and three LoRA teachers are more variants of a block than dynamo takes by itself."""
    third = tiny_world / "adapter3"
    if not third.exists():
        write_lora(tiny_world / "base", third, seed=3)
    tasks = {
        name: own_teacher(tiny_world, path=str(tiny_world / name), guidance=1.0)
        for name in ("adapter", "adapter2", "adapter3")
    }
    few = FEW | {"rollout__guidance": 1.0}
    _, parts = build_run(model__compile_blocks=True, student__kind="lora", tasks=tasks, deepspeed="zero0", **few)
    parts.trainer.run_round(0)
    assert len(with_gradient) > 8
    assert any(with_gradient)
    log = CompilationLog()
    with caplog.at_level("INFO", logger="opd_ds"):
        log.after_round(parts.student.module, 1)
        log.after_round(parts.student.module, 2)
    assert f"blocks, {len(with_gradient)} graphs" in caplog.text
    assert "0 graph breaks" in caplog.text
    assert "round 2" not in caplog.text
    assert "limit" not in caplog.text


def test_variants_that_are_not_compiled_are_told(
    with_gradient: list[bool], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_ds.models.compilation._GRAPHS_PER_CODE", 2)

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    network = nn.Sequential(nn.ModuleList([Block()]))
    with torch._dynamo.config.patch(recompile_limit=1):
        compile_blocks(network)
        (block,) = network[0]
        for x in (torch.zeros(1, 2), torch.zeros(1, 1, 2), torch.zeros(1, 1, 1, 2)):
            block(x)
        assert len(with_gradient) == 2
        with caplog.at_level("INFO", logger="opd_ds"):
            CompilationLog().after_round(network, 1)
    assert "1 blocks, 2 graphs, 1 of them" in caplog.text
    assert "limit of 2 graphs" in caplog.text


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_blocks_whose_weights_are_on_nvme_are_refused(tiny_world: Path, tmp_path: Path, whose: str) -> None:
    swapped = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}}
    optimizer = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}} if whose == "student" else {}
    file = tmp_path / "nvme.json"
    file.write_text(json.dumps(swapped | optimizer))
    changes: dict[str, Any] = {"deepspeed": str(file)}
    if whose == "teacher":
        placed = {"placement": "zero_inference", "deepspeed": str(file)}
        changes = {f"tasks__one__teacher__{key}": value for key, value in placed.items()}

    def find(compiled: bool) -> None:
        data = run_settings(tiny_world, tmp_path / "out", model__compile_blocks=compiled, **changes)
        find_files(DistilConfig.model_validate(data), World())

    find(False)
    key = "deepspeed" if whose == "student" else r"tasks\.one\.teacher\.deepspeed"
    with pytest.raises(UserError, match=rf"model\.compile_blocks = true cannot be with {key}, which keeps .* on NVMe"):
        find(True)


@pytest.mark.slow
def test_compiled_to_machine_code(build_run: Build) -> None:
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        _, parts = build_run(model__compile_blocks=compiled, deepspeed="zero0", student__gradient_checkpointing=True)
        found.append([parts.trainer.run_round(index).losses.loss for index in range(3)])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
