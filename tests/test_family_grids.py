"""All samplers on the grids of the released models' own schedulers."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ds.config.loading import load_config
from opd_ds.diffusion import Coefficients, kernel, kernel_names, kl_weight
from opd_ds.errors import UserError
from opd_ds.models import ModelFamily
from opd_ds.plan.network import find_model

MODELS = {
    "stable-diffusion-3.5-medium": "sd3",
    "FLUX.1-dev": "flux",
    "FLUX.2-klein-4B": "flux2",
    "Qwen-Image": "qwen_image",
    "Z-Image": "z_image",
    "Z-Image-Turbo": "z_image",
    "Wan2.2-TI2V-5B-Diffusers": "wan",
    "Wan2.1-T2V-1.3B-Diffusers": "wan",
}


@cache
def released(name: str) -> ModelFamily:
    overrides = [f"model.path=hub/{name}", f"model.family={MODELS[name]}", "model.max_text_length=null"]
    overrides += ["rollout.guidance=1.0", *(f"tasks.{task}.teacher.guidance=1.0" for task in ("ocr", "aesthetic"))]
    return find_model(load_config("mopd_sd35m", None, overrides)).family


def variances(table: Coefficients, sigmas: Tensor) -> list[float]:
    """Of a rollout's states, exactly, for data of variance 1: the best velocity is then v(x) = (2 sigma - 1) x / V with
    V = (1 - sigma)^2 + sigma^2, every step is linear in x and in the predicted image h, and so are their covariances.
    """
    covariance = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    found = [1.0]
    for step, sigma in enumerate(sigmas[:-1].tolist()):
        velocity = (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2)
        a, b, c, std = (float(values[step]) for values in (table.a, table.b, table.c, table.std))
        map_ = torch.tensor([[a + b * velocity, c], [1 - sigma * velocity, 0.0]], dtype=torch.float64)
        covariance = map_ @ covariance @ map_.T
        covariance[0, 0] += std**2
        found.append(float(covariance[0, 0]))
    return found


@settings(max_examples=300, deadline=None)  # the first of a model reads its family
@given(
    st.sampled_from(sorted(MODELS)),
    st.integers(2, 50),
    st.sampled_from(kernel_names()),
    st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
def test_every_sampler_is_tame_on_every_released_grid(model: str, steps: int, name: str, level: float) -> None:
    sigmas = released(model).sigmas(steps)
    table = kernel(name, level).coefficients(sigmas)
    for values in (table.a, table.b, table.c, table.std):
        assert torch.isfinite(values).all()
        assert float(values.abs().max()) <= 4.01
    assert torch.isfinite(kl_weight(table)).all()
    spread = variances(table, sigmas)
    if steps >= 5:  # fewer leave the Euler-Maruyama steps of `flow` far from the SDE that they follow
        assert max(spread) < 3
    if steps >= 20:
        assert max(spread) < 1.4
        assert spread[-1] > 0.3


@pytest.mark.parametrize("level", [0.3, 0.7])
def test_a_grid_that_starts_just_below_pure_noise_is_one_that_starts_there(level: float) -> None:
    """Wan's: 1 - 1e-6."""
    sigmas = released("Wan2.1-T2V-1.3B-Diffusers").sigmas(10)
    assert 0 < 1 - float(sigmas[0]) < 1e-5
    exact = torch.cat([torch.ones(1, dtype=sigmas.dtype), sigmas[1:]])
    ours, theirs = (kernel("flow", level).coefficients(grid) for grid in (sigmas, exact))
    for mine, other in ((ours.a, theirs.a), (ours.b, theirs.b), (ours.std, theirs.std)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    # From noise: a = 1 - level^2 / 2, std = level, whatever the grid's first step is.
    assert (float(ours.a[0]), float(ours.std[0])) == pytest.approx((1 - level**2 / 2, level), abs=1e-4)


def test_steps_that_a_scheduler_has_no_grid_for_are_refused() -> None:
    """Qwen-Image stretches its grid to end at 0.02, which one step cannot: 0 / 0."""
    family = released("Qwen-Image")
    family.check_steps("rollout.steps", 2)
    with pytest.raises(UserError, match=r"rollout.steps = 1: the scheduler of model.path has no grid.*take more steps"):
        family.check_steps("rollout.steps", 1)
