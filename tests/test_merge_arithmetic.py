"""How weights are merged: each method by hand, and where all agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ds.merge.merging import METHODS, Method

# Entries are far enough from 0 and from each other's negatives that no rule hangs on rounding.
VALUES = st.integers(-50, 50).map(lambda n: n / 8)
few = settings(max_examples=50, deadline=None)


def tensors(count: int, values: st.SearchStrategy[float] = VALUES) -> st.SearchStrategy[list[Tensor]]:
    one = st.lists(values, min_size=6, max_size=6).map(lambda v: torch.tensor(v, dtype=torch.float64).reshape(2, 3))
    return st.lists(one, min_size=count, max_size=count)


def distinct(delta: Tensor) -> bool:
    """No two entries of one size: which of them is trimmed is then no matter of order."""
    return len(set(delta.abs().flatten().tolist())) == delta.numel()


def ties_by_hand(deltas: list[Tensor], weights: list[float], density: float, sign: str) -> Tensor:
    """TIES-Merging (arXiv 2306.01708), entry by entry: trim, elect sign, disjoint mean; weights relative to 1/n."""
    count = len(deltas)
    trimmed = []
    for delta in deltas:
        entries = delta.flatten().tolist()
        kept = sorted(range(len(entries)), key=lambda i: -abs(entries[i]))[: int(density * len(entries))]
        trimmed.append([value if i in kept else 0.0 for i, value in enumerate(entries)])
    merged = []
    for column in zip(*trimmed, strict=True):
        votes = [np.sign(value) for value in column] if sign == "frequency" else column
        elected = 1 if sum(votes) >= 0 else -1
        agreeing = [w * count * value for w, value in zip(weights, column, strict=True) if np.sign(value) == elected]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).reshape(deltas[0].shape)


@few
@given(
    deltas=tensors(3).filter(lambda deltas: all(map(distinct, deltas))),
    weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, -0.5]), min_size=3, max_size=3),
    density=st.sampled_from([0.2, 0.5, 0.7, 1.0]),
    sign=st.sampled_from(["total", "frequency"]),
)
def test_ties_by_hand(deltas: list[Tensor], weights: list[float], density: float, sign: str) -> None:
    found = Method("ties", density=density, majority_sign=sign).combine(deltas, weights)
    torch.testing.assert_close(found, ties_by_hand(deltas, weights, density, sign))


@few
@given(deltas=tensors(3, VALUES.map(lambda v: abs(v) + 0.125)), sign=st.sampled_from([1, -1]))
@pytest.mark.parametrize("name", METHODS)
def test_methods_agree_where_there_is_nothing_to_resolve(name: str, deltas: list[Tensor], sign: int) -> None:
    """Signs agree and nothing is dropped: every method is the weighted sum, so a weight means the same in all."""
    deltas, weights = [sign * delta for delta in deltas], [0.5, 0.2, 0.3]
    found = Method(name, density=None if name == "linear" else 1.0).combine(deltas, weights)
    torch.testing.assert_close(found, sum(w * delta for w, delta in zip(weights, deltas, strict=True)))


def test_density_and_signs_have_their_defaults() -> None:
    torch.manual_seed(0)
    deltas = [torch.randn(5, 8) for _ in range(3)]
    plain = Method("ties").combine(deltas, [0.3] * 3)
    assert torch.equal(plain, Method("ties", density=0.5, majority_sign="total").combine(deltas, [0.3] * 3))
    assert not torch.equal(plain, Method("ties", majority_sign="frequency").combine(deltas, [0.3] * 3))


def test_dare_keeps_the_expectation() -> None:
    """An entry x kept with probability d and divided by d has mean x and variance x^2 (1 - d) / d, so the mean of N
    merges is normal around sum(w x) with variance sum(w^2 x^2) (1 - d) / (d N): 5 deviations fail once in 2 million
    entries. Without the division by d the mean would be off by 70 %, hundreds of deviations."""
    torch.manual_seed(0)
    count, density, weights = 4000, 0.3, [0.7, -0.4]
    deltas = [torch.randn(4, 5, dtype=torch.float64) for _ in weights]
    method = Method("dare_linear", density=density)
    mean = sum(method.combine(deltas, weights) for _ in range(count)) / count
    wanted = sum(w * delta for w, delta in zip(weights, deltas, strict=True))
    variance = sum((w * delta) ** 2 for w, delta in zip(weights, deltas, strict=True)) * (1 - density) / density / count
    assert ((mean - wanted).abs() <= 5 * variance.sqrt()).all()
