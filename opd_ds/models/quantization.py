"""Frozen weights in 8 or 4 bits: torchao stores them, and a layer makes its weight whole for as long as it computes.

Quantized are the linear layers of a network's blocks, where nearly all of its weights are; other layers keep their
precision. So do activations and gradients: what is saved is memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from opd_ds.config.teachers import QuantizedAs
from opd_ds.errors import UserError
from opd_ds.models.compilation import block_names

_BLOCK, _SCALES = 64, 256  # of nf4 (QLoRA, arXiv 2305.14314): weights with one scale, scales that share a second one


def check_quantization(key: str, kind: QuantizedAs) -> None:
    """Raise UserError, naming `key` of the run config, where torchao is not installed."""
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise UserError(f"{key} = {kind!r} needs torchao: pip install 'opd-ds[quantization]'") from error


def quantizer(network: nn.Module, kind: QuantizedAs) -> Callable[[str, nn.Module], None]:
    """What to call with each module of `network` and its name, once the module has its weights."""
    blocks = _inside_blocks(network)

    def quantize(name: str, module: nn.Module) -> None:
        if type(module) is nn.Linear and name.startswith(blocks):
            _quantize(module, kind)

    return quantize


def saved_bytes(network: nn.Module, kind: QuantizedAs) -> float:
    """How much less the weights of `network`, on any device and not quantized, are as `kind`."""
    blocks, saved = _inside_blocks(network), 0.0
    for name, module in network.named_modules():
        if type(module) is nn.Linear and name.startswith(blocks):
            saved += module.weight.nbytes - _stored_bytes(module.weight, kind)
    return saved


def stored_tensors(weight: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a quantized weight consists of."""
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return (getattr(weight, name) for name in names)


class QuantizedLinear(nn.Linear):
    """A linear layer whose frozen weight is a tensor of torchao. It is a buffer: what is trained, sent to other ranks,
    reduced or sharded are parameters.

    Attributes:
        whole: makes of the weight one in the dtype that it had.
    """

    whole: Callable[[Any], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = _Linear.apply(input, self.weight, self.whole)
        return found if self.bias is None else found + self.bias


class _Linear(torch.autograd.Function):
    """Input [..., in] times the transposed weight [out, in]. For the backward it keeps the weight as it is stored;
    torchao's own linear functions of 8 bits keep it whole, which is what quantizing was to save.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, whole: Callable[[Any], Tensor]) -> Tensor:
        ctx.weight, ctx.whole = weight, whole
        return functional.linear(input, whole(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.whole(ctx.weight), None, None


@torch.no_grad()
def _quantize(layer: nn.Linear, kind: QuantizedAs) -> None:
    """In place. What nf4 cannot cut into blocks stays as it is."""
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, to_nf4

    whole = layer.weight.detach()
    if kind == "int8":
        stored = Int8Tensor.from_hp(whole, granularity=PerRow())
    elif kind == "fp8":
        stored = Float8Tensor.from_hp(whole, float8_dtype=torch.float8_e4m3fn, granularity=PerRow())
    elif whole.numel() % _BLOCK == 0:
        stored = to_nf4(whole, _BLOCK, _scales_together(whole))
    else:
        return
    del layer.weight
    layer.register_buffer("weight", stored, persistent=False)
    layer.__class__ = QuantizedLinear
    # Of the class: dynamo (torch 2.13) takes the tensor for one that has no such attribute.
    layer.whole = type(stored).get_original_weight if kind == "nf4" else type(stored).dequantize


def _scales_together(weight: Tensor) -> int:
    return math.gcd(weight.numel() // _BLOCK, _SCALES)


def _stored_bytes(weight: Tensor, kind: QuantizedAs) -> float:
    if kind != "nf4":
        of_a_row = torch.float32.itemsize + (kind == "int8")  # a scale, and a zero point
        return weight.numel() + of_a_row * weight.shape[0]
    if weight.numel() % _BLOCK:
        return weight.nbytes
    scales = weight.numel() // _BLOCK
    return weight.numel() / 2 + scales + weight.itemsize * (scales // _scales_together(weight))


def _inside_blocks(network: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name in block_names(network))
