"""`model.attention`: the same velocity by another kernel, in rollouts, training and teachers, or one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND

from opd_ds.config.sections import AttentionBackend
from opd_ds.errors import UserError
from opd_ds.models import ModelFamily, build_family
from opd_ds.testing import family_checks as checks
from opd_ds.testing.tiny import flux, qwen_image, sd3

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux.write(tmp_path_factory.mktemp("flux") / "base")


def family(
    name: str, folder: Path, attention: AttentionBackend, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> ModelFamily:
    return build_family(name, folder, dtype=dtype, device=device, attention=attention)


def test_velocity_and_gradient_are_those_of_the_default(base: Path) -> None:
    found = {}
    for attention in ("auto", "math", "native"):
        one = family("flux", base, attention)
        one.check_attention()
        network, cond = one.load_transformer(), one.encode(checks.PROMPTS)
        kernels = {
            str(getattr(m.processor, "_attention_backend", None)) for m in network.modules() if hasattr(m, "processor")
        }
        latents = checks.noise(one).draw(slice(None)).requires_grad_()
        velocity = one.velocity(network, latents, torch.tensor([0.5, 0.9, 0.1, 0.3]), cond)
        (gradient,) = torch.autograd.grad(velocity.square().mean(), latents)
        found[attention] = kernels, velocity, gradient
    assert [kernels for kernels, _, _ in found.values()] == [
        {"None"}, {"AttentionBackendName._NATIVE_MATH"}, {"AttentionBackendName.NATIVE"}
    ]  # fmt: skip
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName(DIFFUSERS_ATTN_BACKEND)
    for attention in ("math", "native"):
        torch.testing.assert_close(found[attention][1:], found["auto"][1:], atol=1e-5, rtol=1e-4)


def test_what_cannot_be_had_is_one_line(base: Path, tmp_path: Path) -> None:
    half, single = torch.bfloat16, torch.float32
    cases = [
        (family("flux", base, "cudnn", half), r"= 'cudnn' needs an accelerator; set it to auto$"),
        (family("flux", base, "flash", single, CUDA), r"= 'flash' computes in fp16 and bf16 only; set precision to"),
        (
            family("flux", base, "flash3", half, CUDA),
            r"= 'flash3' is not installed \(Flash Attention 3 .*\); install it",
        ),
        (family("sd3", sd3.write(tmp_path / "sd3"), "native"), r"SD3Transformer2DModel does not go through"),
        (
            family("qwen_image", qwen_image.write(tmp_path / "qwen"), "native_flash", half, CUDA),
            r"knows no mask, which prompts of different lengths need here; set it to one of native, math, efficient",
        ),
    ]
    for one, message in cases:
        with pytest.raises(UserError, match=r"^model.attention .*" + message):
            one.check_attention()
