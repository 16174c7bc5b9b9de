"""Under ZeRO-3 the weights of a transformer's block are gathered and released as one unit.

DeepSpeed hooks every module, twice in forward and twice in backward: in a network of a thousand modules the host is
busy with hooks for longer than a small batch computes. Here a block has them and the modules inside have none. Its own
way to that, leaf modules, fails (0.19.8): it reduces a leaf's gradients in torch's full backward hook, which sees
positional tensors only and so runs at once where diffusers calls blocks by keywords; and it knows of one forward per
backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import nn
from torch.utils.checkpoint import checkpoint

from opd_ds.engine import privates
from opd_ds.engine.ds_components import client_optimizer
from opd_ds.engine.ds_config import NetworkSizes, fill_sizes, parameters_on_nvme
from opd_ds.engine.ds_settings import zero_stage
from opd_ds.models import block_names


def initialize(
    network: nn.Module, ds_config: dict[str, Any], parameters: Iterable[nn.Parameter] | None = None
) -> DeepSpeedEngine:
    """DeepSpeed's engine around `network`; trains `parameters`, or nothing.

    Modules stay as they are where weights are on NVMe: a block has more parameters than DeepSpeed has buffers for
    reading them.
    """
    ds_config = fill_sizes(ds_config, NetworkSizes.of(network))
    by_block = zero_stage(ds_config) == 3 and not parameters_on_nvme(ds_config)
    blocks = [network.get_submodule(name) for name in block_names(network)] if by_block else []
    recomputing = bool(blocks and getattr(network, "gradient_checkpointing", False))
    for block in blocks:
        block.register_forward_pre_hook(partial(_by_position, inspect.signature(block.forward)), with_kwargs=True)
        if recomputing:  # inside the hooks: a recomputation with hooks releases weights before the backward
            block.forward = partial(_recomputed, block.forward)
    if recomputing:
        network.enable_gradient_checkpointing(_call)  # type: ignore[operator]
    optimizer = client_optimizer(ds_config)
    if optimizer is not None:
        ds_config = {key: value for key, value in ds_config.items() if key != "optimizer"}
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=optimizer, model_parameters=parameters, config=ds_config, dist_init_required=False
    )
    if blocks:
        _unhook_inside(blocks, engine)
    return engine


def _unhook_inside(blocks: list[nn.Module], engine: DeepSpeedEngine) -> None:
    """Take DeepSpeed's hooks from the modules in `blocks`; the parameters belong to the blocks from then on."""
    inside = [module for block in blocks for module in block.modules() if module is not block]
    theirs = {id(hooks) for module in inside for hooks in (module._forward_hooks, module._forward_pre_hooks)}
    for handle in privates.module_hooks(engine):
        if id(handle.hooks_dict_ref()) in theirs:
            handle.remove()
    for block in blocks:
        for module in block.children():
            for parameter in module.parameters():
                deepspeed.zero.register_external_parameter(block, parameter)


def _by_position(
    signature: inspect.Signature, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call by position: DeepSpeed releases a module's weights when positional inputs have their gradients."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args, bound.kwargs


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block(*args, **kwargs)
