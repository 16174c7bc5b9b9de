"""Sequences of a network divided over ranks (`model.sequence_parallel`), through the context parallelism of diffusers.

Ulysses (arXiv 2309.14509): each rank has a part of the tokens, and inside self-attention all tokens of a part of the
heads. diffusers (0.42) has the exchange, with its backward, in its attention dispatcher, and where a network's tokens
are divided and gathered in the network's `_cp_plan`. Its `enable_parallelism` is not called: it fails without an
accelerator, and its hooks replace `forward`, so that a copy of the network would call the network it was copied from
(`UnshardedReplica`). Here the same hooks are torch's.

Every rank computes the whole loss from the gathered output, and passes back what its own tokens have in it. A weight's
gradient is therefore the sum over the ranks of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from opd_ds.errors import UserError
from opd_ds.models import privates
from opd_ds.models.two_networks import TwoNetworks


def check_sequences(heads: int, lengths: Mapping[str, int], ranks: int) -> None:
    """Raise UserError where `ranks` cannot share sequences.

    Args:
        heads: of the network's attention.
        lengths: tokens that are divided, by what they are.
    """
    key = f"model.sequence_parallel = {ranks}"
    if heads % ranks:
        raise UserError(f"{key} does not divide the network's {heads} attention heads; allowed: {_divisors(heads)}")
    for what, count in lengths.items():
        if count % ranks:
            raise UserError(f"{key} does not divide the {count} {what}; allowed: {_divisors(count)}, or another size")


def share_sequences(network: nn.Module, mesh: DeviceMesh) -> None:
    """From now on a forward of `network` is collective over the ranks of `mesh` that share sequences: all of them give
    the same inputs and get the same, whole output. Its adapters must be there already.
    """
    parallel = privates.context_parallel(mesh)
    for part in _networks(network):
        for module in part.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "_parallel_config"):
                processor._parallel_config = parallel
        for name, plan in part._cp_plan.items():
            for module in _modules(part, name):
                _divide(module, plan, parallel) if isinstance(plan, dict) else _gather(module, plan, parallel)


def _networks(network: nn.Module) -> Iterable[Any]:
    return network.children() if isinstance(network, TwoNetworks) else [network]


def _modules(network: nn.Module, name: str) -> Iterable[nn.Module]:
    """Those that an entry of a plan names: `blocks.*` are all of a list."""
    parent, _, last = name.rpartition(".")
    return network.get_submodule(parent).children() if last == "*" else [network.get_submodule(name)]


def _divide(module: nn.Module, plan: dict[Any, Any], parallel: Any) -> None:
    """Inputs of the module, and outputs, to this rank's part of them. The functions here are copied with a network as
    they are.
    """
    hook = privates.split_hook()(plan, parallel.context_parallel_config)
    hook.initialize_hook(module)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return hook.pre_forward(module, *args, **kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return hook.post_forward(module, output)

    named = [name for name in plan if isinstance(name, str)]
    if named:
        module.register_forward_pre_hook(before, with_kwargs=True)
    if len(named) < len(plan):
        module.register_forward_hook(after)


def _gather(module: nn.Module, plan: Any, parallel: Any) -> None:
    """Outputs of the module to those of all ranks, one after the other."""
    hook = privates.gather_hook()(plan if isinstance(plan, (list, tuple)) else [plan], parallel.context_parallel_config)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return hook.post_forward(module, output)

    module.register_forward_hook(after)


def _divisors(count: int) -> str:
    return ", ".join(str(ranks) for ranks in range(1, min(count, 64) + 1) if count % ranks == 0)
