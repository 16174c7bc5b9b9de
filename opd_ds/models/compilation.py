"""Blocks of a transformer through `torch.compile`, and what came of it."""

from __future__ import annotations

import logging

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

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


def compile_blocks(network: nn.Module) -> None:
    """Each block of a transformer by itself, at its first call (regional compilation): blocks of a kind share code."""
    _raise_limits()
    for name in block_names(network):
        network.get_submodule(name).compile()


def leave_uncompiled(network: nn.Module) -> None:
    """Undo `compile_blocks`: with ZeRO-3's hooks (DeepSpeed 0.19.8) what a block's code depends on changes with every
    call, and dynamo would compile it anew each time.
    """
    for name in block_names(network):
        network.get_submodule(name)._compiled_call_impl = None


def compile_forwards(network: nn.Module) -> None:
    """The same without the blocks' hooks, which stay as they are, outside of the graphs."""
    _raise_limits()
    for name in block_names(network):
        block = network.get_submodule(name)
        block.forward = torch.compile(block.forward)


def _raise_limits() -> None:
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _GRAPHS_PER_CODE)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, _GRAPHS)


def log_compiled() -> None:
    """One line on what this process has compiled until now; a warning where something was left out."""
    logger = logging.getLogger("opd_ds")
    logger.info("model.compile_blocks: %d graphs compiled", counters["stats"]["unique_graphs"])
    # Dynamo counts each reason for which it leaves code as it is, by a message that names it.
    if any("limit exceeded" in str(reason) for reasons in counters.values() for reason in reasons):
        logger.warning(
            "model.compile_blocks: torch's limit of %d graphs for one block was reached, further variants run "
            "uncompiled; TORCH_LOGS=recompiles says what they differ in",
            torch._dynamo.config.recompile_limit,
        )
