"""Transition kernels against diffusers' schedulers, the authors' formulas, and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from opd_ds.diffusion import (
    gaussian_kl,
    kernel,
    kernel_names,
    kl_weight,
    mean_matching,
    predicted_x0,
    step_weights,
)
from opd_ds.errors import UserError

STOCHASTIC = kernel_names(stochastic=True)
DETERMINISTIC = kernel_names(stochastic=False)


def grid(steps: int = 10, shift: float = 3.0) -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.double()


grids = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=12, unique=True).map(
    lambda inner: torch.tensor([1.0, *sorted(inner, reverse=True), 0.0], dtype=torch.float64)
)
levels = st.floats(0.05, 1.0)


def field(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Some velocity that is not linear."""
    return torch.sin(3 * x) + sigma * torch.cos(x)


@pytest.mark.parametrize("steps", [1, 2, 10, 40])
def test_euler_is_diffusers_flow_match_euler(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    table = kernel("euler").coefficients(scheduler.sigmas)
    ours = theirs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[step])
        theirs = scheduler.step(field(theirs, sigma), timestep, theirs).prev_sample
        ours = table.mean(step, ours, field(ours, sigma), None)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [2, 3, 10, 20])
def test_dpm_is_diffusers_dpm_solver_multistep(order: int, steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=order
    )
    scheduler.set_timesteps(steps)
    sampler = kernel(f"dpm{order}")
    table = sampler.coefficients(scheduler.sigmas)
    ours = theirs = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    history = None
    for step, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[step])
        theirs = scheduler.step(field(theirs, sigma), timestep, theirs).prev_sample
        velocity = field(ours, sigma)
        ours, history = table.mean(step, ours, velocity, history), predicted_x0(ours, velocity, sigma)
        # The scheduler keeps its sigmas in float32.
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_dpm2_is_finite_from_pure_noise_and_of_second_order() -> None:
    """dx/dsigma = x has the solution x * exp(sigma' - sigma); DiffusionOPD's loss fell back to first order here."""
    errors = {}
    for name in ("dpm1", "dpm2"):
        for steps in (40, 160):
            sampler, sigmas = kernel(name), grid(steps, shift=1.0)
            table = sampler.coefficients(sigmas)
            assert all(torch.isfinite(values).all() for values in (table.a, table.b, table.c))
            x, history = torch.ones(1, dtype=torch.float64), None
            for step in range(steps):
                x, history = table.mean(step, x, x, history), predicted_x0(x, x, float(sigmas[step]))
            errors[name, steps] = abs(float(x) - math.exp(-1.0))
    # Four times the steps: a quarter of the error at first order, a sixteenth at second.
    assert 3 < errors["dpm1", 40] / errors["dpm1", 160] < 6
    assert errors["dpm2", 40] / errors["dpm2", 160] > 12


@pytest.mark.parametrize("level", [0.3, 0.7])
def test_flow_is_the_paper_formula(level: float) -> None:
    """DiffusionOPD 3.1: mean (1 + s^2/(2t) dt) x + (1 + s^2 (1-t)/(2t)) v dt, std s sqrt(-dt), s = a sqrt(t/(1-t))."""
    sigmas = grid()
    table = kernel("flow", level).coefficients(sigmas)
    for j in range(1, 10):
        t, dt = float(sigmas[j]), float(sigmas[j + 1] - sigmas[j])
        s = level * math.sqrt(t / (1 - t))
        assert float(table.a[j]) == pytest.approx(1 + s**2 / (2 * t) * dt)
        assert float(table.b[j]) == pytest.approx((1 + s**2 * (1 - t) / (2 * t)) * dt)
        assert float(table.std[j]) == pytest.approx(s * math.sqrt(-dt))
    # Table of Eq. 11's weights for SD3.5, shift 3, 10 steps, a = 0.7.
    if level == 0.7:
        expected = {0: 0.0016, 3: 0.018, 5: 0.069, 7: 0.340, 8: 1.105, 9: 1.568}
        weights = kl_weight(table)
        assert all(float(weights[j]) == pytest.approx(value, rel=0.05) for j, value in expected.items())


def test_flow_replaces_only_the_infinite_denominator_at_pure_noise() -> None:
    sigmas = grid()
    table = kernel("flow", 0.7).coefficients(sigmas)
    expected = 0.7 * math.sqrt(1 / (1 - float(sigmas[1]))) * math.sqrt(float(sigmas[0] - sigmas[1]))
    assert float(table.std[0]) == pytest.approx(expected)


def test_dance_follows_its_authors() -> None:
    """x + v dt + eta^2/2 * score-term, written as in DanceGRPO: score = -(x - x0 (1 - t)) / t^2."""
    sigmas, eta = grid(), 0.3
    table = kernel("dance", eta).coefficients(sigmas)
    x, v = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for j in range(10):
        t, dt = float(sigmas[j]), float(sigmas[j + 1] - sigmas[j])
        score = -(x - (x - t * v) * (1 - t)) / t**2
        expected = x + dt * v - 0.5 * eta**2 * score * dt
        torch.testing.assert_close(table.mean(j, x, v, None), expected)
        assert float(table.std[j]) == pytest.approx(eta * math.sqrt(-dt))


@given(grids, levels)
def test_cps_and_ddim_preserve_the_coefficients_of_the_interpolation(sigmas: torch.Tensor, level: float) -> None:
    """With the exact velocity, x' has mean (1 - sigma') x0 and total noise level sigma' again."""
    for name in ("cps", "ddim"):
        table = kernel(name, level).coefficients(sigmas)
        on_x0 = table.a * (1 - sigmas[:-1]) - table.b  # x = (1 - s) x0 + s n, v = n - x0
        on_noise = table.a * sigmas[:-1] + table.b
        torch.testing.assert_close(on_x0, 1 - sigmas[1:], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(on_noise**2 + table.std**2, sigmas[1:] ** 2, rtol=1e-9, atol=1e-9)


@given(grids, st.sampled_from(["ddim", "cps", "dance", "flow"]))
def test_noise_level_zero_is_the_euler_ode(sigmas: torch.Tensor, name: str) -> None:
    """All of them discretise the same flow; without noise they are one map, and the weight is mean matching."""
    ours, euler = kernel(name, 0.0).coefficients(sigmas), kernel("euler").coefficients(sigmas)
    torch.testing.assert_close(ours.a, euler.a)
    torch.testing.assert_close(ours.b, euler.b)
    assert not ours.std.any()
    torch.testing.assert_close(kl_weight(ours), mean_matching(euler))
    assert not kernel(name, 0.0).stochastic


@given(grids, levels, st.sampled_from(STOCHASTIC), st.integers(0, 2**31))
def test_weight_times_velocity_error_is_the_exact_kl(sigmas: torch.Tensor, level: float, name: str, seed: int) -> None:
    """Invariant 5, for every stochastic kernel, schedule and noise level."""
    table = kernel(name, level).coefficients(sigmas)
    generator = torch.Generator().manual_seed(seed)
    x, student, teacher = (torch.randn(6, dtype=torch.float64, generator=generator) for _ in range(3))
    weights = kl_weight(table)
    for j in range(len(table)):
        std = float(table.std[j])
        if std == 0:
            torch.testing.assert_close(weights[j], table.b[j] ** 2 / 2)
            continue
        p = Independent(Normal(table.mean(j, x, student, None), std), 1)
        q = Independent(Normal(table.mean(j, x, teacher, None), std), 1)
        ours = weights[j] * (student - teacher).square().sum()
        # The means differ by rounding of x / std, which small std amplify.
        torch.testing.assert_close(ours, kl_divergence(p, q), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gaussian_kl(p.mean[None], q.mean[None], std)[0], kl_divergence(p, q))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_kl_agrees_with_monte_carlo(name: str) -> None:
    table = kernel(name, 0.7).coefficients(grid())
    generator = torch.Generator().manual_seed(0)
    x, student = (torch.randn(4, dtype=torch.float64, generator=generator) for _ in range(2))
    teacher = student + 0.5 * torch.randn(4, dtype=torch.float64, generator=generator)
    step = 4
    p, q = (Normal(table.mean(step, x, v, None), float(table.std[step])) for v in (student, teacher))
    draws = p.mean + p.scale * torch.randn(200_000, 4, dtype=torch.float64, generator=generator)
    log_ratio = (p.log_prob(draws) - q.log_prob(draws)).sum(1)
    ours = float(kl_weight(table)[step] * (student - teacher).square().sum())
    assert ours == pytest.approx(float(log_ratio.mean()), abs=4 * float(log_ratio.std()) / math.sqrt(len(draws)))


@settings(max_examples=50)
@given(grids, st.one_of(st.just(0.0), st.floats(1e-3, 1.0)), st.sampled_from(kernel_names()))
def test_tables_are_finite_everywhere(sigmas: torch.Tensor, level: float, name: str) -> None:
    """From sigma = 1 to sigma' = 0, at any level: no NaN, no infinity, weights not negative."""
    table = kernel(name, level).coefficients(sigmas)
    for values in (table.a, table.b, table.c, table.std, kl_weight(table)):
        assert values.dtype == torch.float64
        assert values.shape == (len(sigmas) - 1,)
        assert torch.isfinite(values).all()
    assert (kl_weight(table) >= 0).all()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_kernels_have_no_noise_whatever_the_level(name: str) -> None:
    """The public code divided by a clamped std of 1e-8 here."""
    table = kernel(name, 0.7).coefficients(grid())
    assert not table.std.any()
    torch.testing.assert_close(kl_weight(table), mean_matching(table))


def test_targets_and_weightings() -> None:
    sigmas = grid()
    table = kernel("flow", 0.7).coefficients(sigmas)
    torch.testing.assert_close(step_weights(table, sigmas, "transition", "kl"), kl_weight(table))
    torch.testing.assert_close(step_weights(table, sigmas, "transition", "uniform"), table.b**2 / 2)
    torch.testing.assert_close(step_weights(table, sigmas, "velocity", "uniform"), torch.full((10,), 0.5).double())
    torch.testing.assert_close(step_weights(table, sigmas, "x0", "uniform"), sigmas[:-1] ** 2 / 2)
    assert float(step_weights(table, sigmas, "x0", "normalized").mean()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="belongs to target"):
        step_weights(table, sigmas, "velocity", "kl")


def test_errors_name_the_value_and_what_is_allowed() -> None:
    with pytest.raises(UserError, match=r"'eulr'.*allowed: euler.*Did you mean 'euler'"):
        kernel("eulr")
    with pytest.raises(UserError, match=r"noise_level 1.5.*'cps'.*0 to 1"):
        kernel("cps", 1.5)
    with pytest.raises(ValueError, match="decrease"):
        kernel("euler").coefficients(torch.tensor([0.0, 0.5, 1.0]))
    with pytest.raises(ValueError, match=r"\[T\+1\]"):
        kernel("euler").coefficients(torch.tensor([1.0]))
    table = kernel("dpm2").coefficients(grid())
    with pytest.raises(ValueError, match="history"):
        table.mean(3, torch.zeros(1), torch.zeros(1), None)
