"""Blocks of a transformer through `torch.compile`, and what came of it."""

from __future__ import annotations

import logging

import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

# Blocks of a kind share one code, and every variant of it counts: each kind of block, with and without a gradient, each
# teacher's adapter, batches of one row and of several. Past the limit (8 in torch 2.13) what is new runs uncompiled.
_GRAPHS_PER_CODE, _GRAPHS = 256, 1024


def compile_blocks(network: nn.Module) -> None:
    """Each block of a transformer by itself, at its first call (regional compilation): blocks of a kind share code."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _GRAPHS_PER_CODE)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, _GRAPHS)
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            for block in child:
                block.compile()


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
