"""Blocks of a transformer through `torch.compile`, and what came of it."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import calculate_time_spent, counters, get_compilation_metrics, set_compilation_metrics_limit

from opd_ds.models.two_networks import TwoNetworks

# Blocks of a kind share one code, and every variant of it counts: each kind of block, with and without a gradient, each
# teacher's adapter, batches of one row and of several. Past the limit (8 in torch 2.13) what is new runs uncompiled.
_GRAPHS_PER_CODE, _GRAPHS = 256, 1024


def block_names(network: nn.Module) -> list[str]:
    """The blocks of a transformer, in order: the elements of its lists of modules; of two networks those of both."""
    if isinstance(network, TwoNetworks):
        return [f"{part}.{name}" for part, one in network.named_children() for name in block_names(one)]
    lists = {name: child for name, child in network.named_children() if isinstance(child, nn.ModuleList)}
    return [f"{name}.{index}" for name, blocks in lists.items() for index in range(len(blocks))]


class CompiledForward:
    """A block's forward through `torch.compile`, with any number of rows in one graph.

    Hooks of the block stay outside of the graph: those of ZeRO-3, which gather and release its weights, change with
    every call what a graph with them would depend on (DeepSpeed 0.19.8), and so do those that stream weights. A graph
    takes weights as inputs and keeps for its backward the parameters, no views of them (torch 2.13), so weights that
    hooks release are released.

    Of a copied block (`copy.deepcopy`) it compiles the copy's forward.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self._forward, self._compiled = forward, torch.compile(forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
        for value in tensors:
            # A batch of one row is a graph of its own, whatever is marked (torch 2.13).
            if 1 < len(value) == len(tensors[0]):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return self._compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledForward:
        return CompiledForward(copy.deepcopy(self._forward, memo))


def compile_blocks(network: nn.Module) -> None:
    """Each block of a transformer by itself, at its first call (regional compilation): blocks of a kind share code.

    Under ZeRO-3 before the engine is made, which hooks blocks and leaves the modules inside them without hooks.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _GRAPHS_PER_CODE)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, _GRAPHS)
    set_compilation_metrics_limit(_GRAPHS)
    for name in block_names(network):
        block = network.get_submodule(name)
        block.forward = CompiledForward(block.forward)


class CompilationLog:
    """Says what this process has compiled, after the rounds in which it has."""

    def __init__(self) -> None:
        self._graphs = 0

    def after_round(self, network: nn.Module, number: int) -> None:
        """One line where there are new graphs; a warning where something was left out.

        Args:
            network: whose blocks are compiled; for their number.
            number: of the round, from 1.
        """
        graphs = counters["stats"]["unique_graphs"]
        if graphs == self._graphs:
            return
        self._graphs = graphs
        logger = logging.getLogger("opd_ds")
        logger.info(
            "model.compile_blocks, until the end of round %d: %d blocks, %d graphs, %d of them recompiled for further "
            "variants, %d graph breaks, %.0f s of compilation",
            number, len(block_names(network)), graphs, _recompiled(), sum(counters["graph_break"].values()),
            calculate_time_spent()["total_wall_time"],
        )  # fmt: skip
        # Dynamo counts each reason for which it leaves code as it is, by a message that names it.
        if any("limit exceeded" in str(reason) for reasons in counters.values() for reason in reasons):
            logger.warning(
                "model.compile_blocks: torch's limit of %d graphs for one block was reached, further variants run "
                "uncompiled; TORCH_LOGS=recompiles says what they differ in",
                torch._dynamo.config.recompile_limit,
            )


def _recompiled() -> int:
    """Compilations of a code that had a graph already, which did not fit."""
    return sum(found.recompile_reason is not None and found.fail_type is None for found in get_compilation_metrics())
