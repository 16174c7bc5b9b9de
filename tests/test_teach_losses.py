"""The mathematics of learning from rewards: what the papers' losses promise, in numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from opd_ds.config.rl import GuardSection, NftSection
from opd_ds.config.sections import TrainedSteps
from opd_ds.diffusion import kernel, log_ratio
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.training.buffer import noised_states
from opd_ds.training.rl.advantages import group_advantages, optimality, weighted_sum
from opd_ds.training.rl.grpo_guard import GrpoGuardKnown, GrpoGuardLoss
from opd_ds.training.rl.nft import NftKnown, NftLoss
from opd_ds.training.steps import choose_steps, last_steps

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
# The grid of SD3's scheduler at shift 3.
UNIFORM = torch.linspace(1, 0, 11, dtype=torch.float64)
SIGMAS = 3 * UNIFORM / (1 + 2 * UNIFORM)


def draws(seed: int, count: int, *names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, *SHAPE, generator=generator) for name in names}


# ---- DiffusionNFT ----


def nft_gradient(good: float, beta: float, *, kl: float = 0.0) -> Tensor:
    """Of the loss at v = v_old, by the velocity."""
    known = draws(0, 6, "old", "flow")
    velocity = known["old"].clone().requires_grad_()
    loss = NftLoss(NftSection(algorithm="nft", beta=beta, kl=kl), SIGMAS, CPU)
    known |= {"optimality": torch.full((6,), good), "start": known["old"]}
    loss(velocity, torch.tensor([0, 1, 4, 6, 8, 9]), NftKnown(**known))[0].sum().backward()
    assert velocity.grad is not None
    return velocity.grad


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_gradient_at_the_old_policy_is_proportional_to_2r_minus_1(beta: float) -> None:
    best = nft_gradient(1.0, beta)
    assert float(best.abs().max()) > 1e-3
    for good in (0.0, 0.2, 0.5, 0.7, 0.95):
        torch.testing.assert_close(nft_gradient(good, beta), (2 * good - 1) * best, rtol=1e-4, atol=1e-7)


def test_nft_learns_nothing_from_r_one_half() -> None:
    assert float(nft_gradient(0.5, 1.0).abs().max()) < 1e-6 * float(nft_gradient(1.0, 1.0).abs().max())
    # The distance to the start has no gradient there either.
    assert float(nft_gradient(0.5, 1.0, kl=1.0).abs().max()) < 1e-6


@given(seed=st.integers(0, 10_000), beta=st.floats(0.05, 2.0), step=st.integers(0, 9))
def test_nft_loss_is_the_one_of_the_authors_code(seed: int, beta: float, step: int) -> None:
    """Theirs is written with predicted images x0 = x - t v, ours with velocities: the same number."""
    known = draws(seed, 3, "old", "eps", "x0", "velocity", "start")
    sigma = float(SIGMAS[step])
    x = (1 - sigma) * known["x0"] + sigma * known["eps"]
    good = torch.rand(3, generator=torch.Generator().manual_seed(seed))

    def error(v: Tensor) -> Tensor:
        predicted = x - sigma * v
        weight = (predicted - known["x0"]).abs().mean((1, 2, 3)).clamp_min(1e-5)
        return ((predicted - known["x0"]) ** 2).mean((1, 2, 3)) / weight

    plus = beta * known["velocity"] + (1 - beta) * known["old"]
    minus = (1 + beta) * known["old"] - beta * known["velocity"]
    expected = 5 * (good * error(plus) + (1 - good) * error(minus)) / beta
    expected = expected + 0.3 * (known["velocity"] - known["start"]).square().mean((1, 2, 3))
    loss = NftLoss(NftSection(algorithm="nft", beta=beta, kl=0.3), SIGMAS, CPU)
    asked = {"old": known["old"], "flow": known["eps"] - known["x0"], "start": known["start"], "optimality": good}
    found, _ = loss(known["velocity"], torch.full((3,), step), NftKnown(**asked))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)


def test_noised_states_are_flow_matchings() -> None:
    final = draws(1, 2, "x0")["x0"]
    every = torch.arange(10).expand(2, -1)
    noised = noised_states(final, SampleNoise([1, 2], SHAPE), SIGMAS, every, torch.float32)
    assert noised.states.shape == (2, 10, *SHAPE)
    sigma = SIGMAS[:-1].float()[None, :, None, None, None]
    torch.testing.assert_close(noised.states - sigma * noised.flow, final[:, None].expand(-1, 10, -1, -1, -1))
    assert not torch.equal(noised.flow[:, 0], noised.flow[:, 1])  # each step has noise of its own
    some = torch.tensor([[1, 4], [0, 9]])
    fewer = noised_states(final, SampleNoise([1, 2], SHAPE), SIGMAS, some, torch.float32)
    for name in ("states", "flow"):
        expected = getattr(noised, name)[torch.arange(2)[:, None], some]
        assert torch.equal(getattr(fewer, name), expected)


# ---- GRPO-Guard ----


def ratios(count: int = 4000, level: float = 0.7) -> tuple[Tensor, Tensor]:
    """Of many transitions at every step of the flow SDE, for one velocity that is a little off: [T, count] twice."""
    table = kernel("flow", level).coefficients(SIGMAS)
    velocity, noise = draws(2, count, "v")["v"], draws(3, count, "e")["e"]
    off = velocity + 0.05 * draws(4, 1, "d")["d"]
    rows = []
    for b, std in zip(table.b.float(), table.std.float(), strict=True):
        scaled = velocity + (off - velocity) / b  # one difference of means for all steps
        rows.append(log_ratio(scaled, velocity, noise, b.expand(count), std.expand(count)))
    guarded, plain = (torch.stack(column) for column in zip(*rows, strict=True))
    return guarded, plain


def test_guards_log_ratio_has_zero_mean_and_one_scale_at_all_steps() -> None:
    guarded, plain = ratios()
    scale = guarded.std(1)
    # Zero mean: within 4 standard errors; the plain one is below by many.
    assert (guarded.mean(1).abs() < 4 * scale / guarded.shape[1] ** 0.5).all()
    assert float(scale.max() / scale.min()) < 1.001
    bias = plain.mean(1) / (plain.std(1) / plain.shape[1] ** 0.5)
    assert (bias < -4).sum() >= 5
    assert float(plain.std(1).max() / plain.std(1).min()) > 3


@given(seed=st.integers(0, 10_000), std=st.floats(0.05, 2.0), b=st.floats(-1.0, -0.01))
def test_log_ratio_is_that_of_torch_distributions(seed: int, std: float, b: float) -> None:
    known = {name: value.double() for name, value in draws(seed, 2, "v", "old", "eps", "x").items()}
    old_mean, mean = known["x"] + b * known["old"], known["x"] + b * known["v"]
    drawn = old_mean + std * known["eps"]
    expected = (Normal(mean, std).log_prob(drawn) - Normal(old_mean, std).log_prob(drawn)).mean((1, 2, 3))
    tables = torch.full((2,), b), torch.full((2,), std)
    along, found = log_ratio(known["v"].float(), known["old"].float(), known["eps"].float(), *tables)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        along.double(), std * expected + (mean - old_mean).square().mean((1, 2, 3)) / (2 * std), rtol=1e-3, atol=1e-4
    )


def guard(**settings: Any) -> GrpoGuardLoss:
    table = kernel("flow", 0.7).coefficients(SIGMAS)
    return GrpoGuardLoss(GuardSection(algorithm="guard", **settings), table, SIGMAS, range(len(table) - 1), CPU)


def test_guard_raises_what_was_good_and_lowers_what_was_bad() -> None:
    """At the old policy the gradient is -A b eps / dimensions: along the noise that was drawn, whatever the step."""
    known = draws(5, 4, "velocity", "noise")
    velocity = known["velocity"].clone().requires_grad_()
    advantage = torch.tensor([2.0, -1.0, 0.0, 0.5])
    steps = torch.tensor([1, 4, 6, 8])
    loss, measured = guard()(velocity, steps, GrpoGuardKnown(**known, advantage=advantage))
    loss.sum().backward()
    b = kernel("flow", 0.7).coefficients(SIGMAS).b[steps].float()
    expected = -(advantage * b)[:, None, None, None] * known["noise"] / known["noise"][0].numel()
    assert velocity.grad is not None
    torch.testing.assert_close(velocity.grad, expected)
    torch.testing.assert_close(measured["ratio"], torch.ones(4))
    assert not measured["clipped"].any()


def test_guard_stops_at_the_clip() -> None:
    """A sample whose likelihood has moved beyond the clip in the good direction has no gradient any more."""
    known = draws(6, 2, "velocity", "noise")
    b = kernel("flow", 0.7).coefficients(SIGMAS).b[5].float()
    moved = (known["velocity"] + 0.1 * known["noise"] / b).requires_grad_()  # D = 0.1 eps: ratio about e^0.1
    loss, measured = guard(clip=0.05)(
        moved, torch.tensor([5, 5]), GrpoGuardKnown(**known, advantage=torch.tensor([1.0, -1.0]))
    )
    loss.sum().backward()
    assert moved.grad is not None
    assert not moved.grad[0].any()
    assert moved.grad[1].any()
    assert measured["clipped"].tolist() == [1.0, 0.0]


def test_guard_can_even_out_steps_and_keep_the_start() -> None:
    known = draws(7, 2, "velocity", "noise", "start") | {"advantage": torch.ones(2)}
    steps = torch.tensor([0, 8])
    free = {name: value for name, value in known.items() if name != "start"}
    even, _ = guard(step_weighting="inverse_dt")(known["velocity"], steps, GrpoGuardKnown(**free))
    plain, _ = guard()(known["velocity"], steps, GrpoGuardKnown(**free))
    dt = (SIGMAS[:-1] - SIGMAS[1:]).float()
    weights = 1 / dt / (1 / dt)[:-1].mean()  # the last step, the shortest, is not trained
    torch.testing.assert_close(even / plain, weights[steps])
    assert float(weights[:-1].mean()) == pytest.approx(1)
    held, measured = guard(kl=0.5)(known["velocity"], steps, GrpoGuardKnown(**known))
    torch.testing.assert_close(held - plain, 0.5 * measured["start_kl"])
    assert (measured["start_kl"] > 0).all()


# ---- advantages ----


rewards_of_groups = st.lists(
    st.lists(st.one_of(st.floats(-5, 5), st.just(float("nan"))), min_size=4, max_size=4), min_size=1, max_size=5
)


@given(rewards_of_groups, st.sampled_from(["batch", "group"]))
def test_advantages_compare_within_a_group(rewards: list[list[float]], std: Any) -> None:
    flat = torch.tensor(rewards, dtype=torch.float64).flatten()
    advantages = group_advantages(flat, 4, std)
    assert torch.isfinite(advantages).all()
    assert not advantages[torch.isnan(flat)].any()  # never judged: never learned from
    torch.testing.assert_close(
        advantages.view(-1, 4).sum(1), torch.zeros(len(rewards), dtype=torch.float64), rtol=0, atol=1e-6
    )
    for row, found in zip(torch.tensor(rewards, dtype=torch.float64), advantages.view(-1, 4), strict=True):
        judged = torch.isfinite(row)
        order = row[judged].argsort(stable=True)
        assert (found[judged][order].diff() >= -1e-9).all()


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, float("nan")])
    batch = torch.tensor([1.0, 3.0, 10.0]).std(correction=0)
    expected = torch.tensor([-1.0, 1.0]) / (batch + 1e-4)
    found = group_advantages(rewards, 2, "batch")
    torch.testing.assert_close(found[:2].float(), expected)
    assert found[2:].tolist() == [0.0, 0.0]  # alone in its group: nothing to compare with
    torch.testing.assert_close(
        group_advantages(rewards, 2, "group")[:2].float(), torch.tensor([-1.0, 1.0]) / (1 + 1e-4)
    )


def test_rewards_of_other_sizes_weigh_alike_by_their_deviation() -> None:
    """PickScore's own deviation is twenty times OCR's: without scaling the sum is PickScore's."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    rewards = normal * torch.tensor([2.0, 0.1]) + torch.tensor([22.0, 0.5])

    def correlations(scale: Any) -> list[float]:
        total = weighted_sum(rewards, [1.0, 1.0], scale)
        return [float(torch.corrcoef(torch.stack([total, own]))[0, 1]) for own in rewards.T]

    assert correlations("none")[1] < 0.15
    assert correlations("deviation") == pytest.approx([0.5**0.5] * 2, abs=0.1)
    rewards[3, 1] = torch.nan
    assert torch.isnan(weighted_sum(rewards, [1.0, 1.0], "deviation")).nonzero().flatten().tolist() == [3]
    same = torch.ones(5, 2)
    assert weighted_sum(same, [1.0, 2.0], "deviation").tolist() == [3.0] * 5


def test_optimality_modes() -> None:
    advantages = torch.tensor([-10.0, -1.0, 0.0, 2.5, 10.0])
    expected = {
        "all": [0.0, 0.4, 0.5, 0.75, 1.0],
        "positive_only": [0.5, 0.5, 0.5, 0.75, 1.0],
        "negative_only": [0.0, 0.4, 0.5, 0.5, 0.5],
        "one_only": [0.5, 0.5, 0.5, 0.6, 0.6],
        "binary": [0.4, 0.4, 0.5, 0.6, 0.6],
    }
    for mode, values in expected.items():
        torch.testing.assert_close(optimality(advantages, 5.0, mode), torch.tensor(values))  # type: ignore[arg-type]


# ---- steps ----


def test_low_noise_queries_fall_late() -> None:
    """Beta(5, 2): mean 5/7 of the way, and no step is asked twice in one trajectory."""
    favour = TrainedSteps(queries=1, favour="low_noise")
    late = choose_steps(favour, 16, 0, 0, "t", list(range(3000))).double()
    assert float((late.mean() + 0.5) / 16) == pytest.approx(5 / 7, abs=0.01)
    even = choose_steps(TrainedSteps(queries=1), 16, 0, 0, "t", list(range(3000))).double()
    assert float((even.mean() + 0.5) / 16) == pytest.approx(0.5, abs=0.02)
    several = choose_steps(TrainedSteps(queries=3, favour="low_noise"), 16, 0, 0, "t", list(range(50)))
    assert all(len(set(row)) == 3 for row in several.tolist())
    noisy = choose_steps(TrainedSteps(queries=1, favour="high_noise"), 16, 0, 0, "t", list(range(3000))).double()
    assert float((noisy.mean() + 0.5) / 16) == pytest.approx(2 / 7, abs=0.01)


@pytest.mark.parametrize("favour", ["none", "low_noise", "high_noise"])
@pytest.mark.parametrize(("steps", "queries"), [(4, 3), (10, 2), (16, 4), (5, 5)])
def test_queries_that_are_spread_lie_apart_and_fall_where_they_are_wanted(
    steps: int, queries: int, favour: Any
) -> None:
    setting = TrainedSteps(queries=queries, favour=favour, spread=True)
    drawn = choose_steps(setting, steps, 0, 0, "t", list(range(400)))
    assert drawn.shape == (400, queries)
    assert (drawn.diff() > 0).all()
    if favour == "none":
        assert int(drawn.diff().min()) >= steps // queries
        found = torch.bincount(drawn.flatten(), minlength=steps) / 400
        torch.testing.assert_close(found, torch.full((steps,), queries / steps), rtol=0, atol=0.15)
    else:  # as likely as one query falls there, but no step more than once
        one = choose_steps(TrainedSteps(queries=1, favour=favour), steps, 0, 0, "t", list(range(400)))
        wanted = torch.bincount(one.flatten(), minlength=steps) / 400 * queries
        found = torch.bincount(drawn.flatten(), minlength=steps) / 400
        assert (found <= 1).all()
        assert (found[wanted < 1] > wanted[wanted < 1] - 0.2).all()
    assert float(last_steps(setting, steps).double().mean()) == pytest.approx(
        float(drawn[:, -1].double().mean()), abs=0.25
    )
