"""The part `attention`: kernels of `model.attention` in blocks of FLUX.1's true width, against float32.

Each has a process of its own: after an illegal memory access a process can do nothing more on its device.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any, cast

import diffusers
import torch
from torch import Tensor, nn

from benchmarks.gpu.session import Session, synchronise
from opd_ds.config.sections import AttentionBackend
from opd_ds.errors import UserError
from opd_ds.models.attention import BACKENDS, check_attention, set_attention
from opd_ds.plan.inputs import network_inputs

# FLUX.1-dev's configuration but for the number of its blocks, which are alike.
_BLOCKS = {"num_layers": 1, "num_single_layers": 2}
_LATENT, _TEXT = (16, 128, 128), 512  # 1024 x 1024 pixels
_NARROW = {"num_attention_heads": 2, "attention_head_dim": 64, "axes_dims_rope": (8, 28, 28), "joint_attention_dim": 64}
_TIMED = 10
_ROUNDING = 5e-2  # relative, of bf16 in three blocks


def attention(session: Session) -> None:
    """Velocity and gradient of each kernel that is installed, and the time they take."""
    with torch.device("meta"):
        network = diffusers.FluxTransformer2DModel(**_config(session.on_gpu))
    for name in BACKENDS:
        with session.check(name) as found:
            try:
                check_attention(name, network, dtype=_dtype(session.on_gpu), device=session.group.device, masked=False)
            except UserError as error:
                found |= {"available": False, "why": str(error)}
                continue
            command = [sys.executable, "-m", __name__, name]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=session.left, check=False)
            if ended.returncode:
                raise RuntimeError(" ".join(ended.stderr.strip().splitlines()[-1:]) or f"exit code {ended.returncode}")
            found |= json.loads(ended.stdout.splitlines()[-1])


def measure(name: AttentionBackend) -> dict[str, Any]:
    """One kernel's errors and milliseconds on this process's device."""
    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), _dtype(on_gpu)
    latent, text = (_LATENT, _TEXT) if on_gpu else ((16, 16, 16), 16)
    torch.manual_seed(0)
    with device:
        network = diffusers.FluxTransformer2DModel(**_config(on_gpu)).requires_grad_(False)
    inputs = _inputs(dict(network.config), latent, text, device)
    exact = _computed(network, inputs, torch.float32)
    set_attention(network.to(dtype), name)
    found: dict[str, Any] = {"available": True}
    for what, got, want in zip(("velocity", "gradient"), _computed(network, inputs, dtype), exact, strict=True):
        found[f"{what}, relative error"] = float((got.float() - want).norm() / want.norm())
    found["ok"] = max(found["velocity, relative error"], found["gradient, relative error"]) < _ROUNDING
    return found | _timed(network, inputs, dtype)


def _config(on_gpu: bool) -> dict[str, Any]:
    return _BLOCKS | {"guidance_embeds": True} | ({} if on_gpu else _NARROW)


def _dtype(on_gpu: bool) -> torch.dtype:
    return torch.bfloat16 if on_gpu else torch.float32


def _inputs(config: dict[str, Any], latent: tuple[int, ...], text: int, device: torch.device) -> dict[str, Any]:
    """Random states and prompts; positions as the pipeline numbers them do not matter for any kernel."""
    asked = network_inputs("FluxTransformer2DModel", config, latent, 1, text, torch.float32)
    made = {
        name: torch.randn(value.shape, device=device) if isinstance(value, Tensor) else value
        for name, value in asked.items()
    }
    return made | {"timestep": torch.full((1,), 0.5, device=device)}


def _cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _computed(network: nn.Module, inputs: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The velocity, and the gradient of its mean square with respect to the states."""
    given = _cast(inputs, dtype)
    states = given["hidden_states"].requires_grad_()
    velocity = network(**given)[0]
    (gradient,) = torch.autograd.grad(velocity.float().square().mean(), states)
    return velocity.detach(), gradient


def _timed(network: nn.Module, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of a forward without gradient, and of forward and backward; the first of each is not counted."""
    given = _cast(inputs, dtype)

    def forward() -> None:
        with torch.no_grad():
            network(**given)

    def both() -> None:
        _computed(network, inputs, dtype)

    found = {}
    for name, call in (("forward, ms", forward), ("forward and backward, ms", both)):
        call()
        synchronise()
        started = time.perf_counter()
        for _ in range(_TIMED):
            call()
        synchronise()
        found[name] = 1e3 * (time.perf_counter() - started) / _TIMED
    return found


if __name__ == "__main__":
    print(json.dumps(measure(cast(AttentionBackend, sys.argv[1]))))
