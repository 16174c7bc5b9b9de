"""A rollout that nobody looks at stops at the last state that is needed, and teaches the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ds.config.schema import RunConfig
from opd_ds.diffusion import kernel, kernel_names
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.diffusion.rollout import Keep, Rows, Trajectory, in_step, micro_batches, rollout
from opd_ds.plan.passes import round_passes
from opd_ds.runs.setup import Parts
from tests.test_round import SGD

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.2, 0.0], dtype=torch.float64)
Build = Callable[..., tuple[RunConfig, Parts]]


@settings(deadline=None)
@given(st.integers(1, 3).flatmap(lambda ranks: st.lists(st.lists(st.integers(0, 9), min_size=7, max_size=7),
       min_size=ranks, max_size=ranks)), st.integers(1, 8))  # fmt: skip
def test_ranks_make_equally_many_forwards(steps: list[list[int]], size: int) -> None:
    """Every sample once, at least its own steps, and only one of a micro-batch more than that."""
    by_rank = [in_step(steps, size, rank) for rank in range(len(steps))]
    assert all([part.length for part in parts] == [part.length for part in by_rank[0]] for parts in by_rank)
    for own, parts in zip(steps, by_rank, strict=True):
        assert sorted(row for part in parts for row in part.rows) == list(range(7))
        for part in parts:
            assert len(part.rows) <= size
            assert part.rows == sorted(part.rows)
            more = [taken - own[row] for row, taken in zip(part.rows, part.steps, strict=True)]
            assert min(more) >= 0
            assert sum(extra > 0 for extra in more) <= 1
    needed = max(map(max, steps))
    assert by_rank[0][0].length == needed, "those that go on for longest are together, and first"


def test_a_rollout_is_float32_whatever_torchs_default_is() -> None:
    """Libraries change it while they read a network, for all threads."""
    seen = set()

    def predict(x: Tensor, sigma: Tensor, rows: Rows, step: int) -> Tensor:
        seen.add((x.dtype, sigma.dtype))
        return x

    torch.set_default_dtype(torch.bfloat16)
    try:
        table = kernel("flow", 0.6).coefficients(SIGMAS)
        found = rollout(predict, SampleNoise([1, 2], (2, 3, 3)), table, SIGMAS, device=torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == {(torch.float32, torch.float32)}
    assert found.final.dtype == torch.float32


def test_samples_of_one_length_stay_in_order() -> None:
    assert [part.rows for part in micro_batches([4] * 5, 2)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("name", kernel_names())
def test_states_up_to_the_last_one_needed_are_those_of_the_whole_rollout(name: str) -> None:
    """Bit for bit where a row's velocity does not depend on its batch; multistep and stochastic samplers, too."""
    table = kernel(name, 0.6 if name in kernel_names(stochastic=True) else 0.0).coefficients(SIGMAS)
    chosen = torch.tensor([[0, 1], [2, 4], [0, 3], [1, 2], [3, 4]])
    forwards = []

    def predict(x: Tensor, sigma: Tensor, rows: Rows, step: int) -> Tensor:
        forwards.append(len(x))
        return torch.stack([torch.sin(one * (1 + row)) for one, row in zip(x, rows.host, strict=True)])

    def rolled(steps: list[int]) -> Trajectory:
        forwards.clear()
        noise = SampleNoise([1, 2, 3, 4, 5], (2, 3, 3))
        keep = Keep(chosen, torch.float32, transitions=True)
        return rollout(predict, noise, table, SIGMAS, micro_batches(steps, 3), device=torch.device("cpu"), keep=keep)

    whole = rolled([5] * 5)
    assert sum(forwards) == 25
    stopped = rolled((chosen[:, -1] + 1).tolist())
    assert sum(forwards) == int((chosen[:, -1] + 1).sum())
    assert whole.velocity is not None
    for part in ("states", "velocity", "noise"):
        assert torch.equal(getattr(whole, part), getattr(stopped, part))


MODES: dict[str, dict[str, Any]] = {
    "buffered": {},
    "fused": {"rollout__mode": "fused"},
    "ppo": {"rollout__kernel": "flow", "rollout__noise_level": 0.7, "objective": {"method": "ppo"}},
}


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_that_of_finished_rollouts(
    build_run: Build, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Bit for bit where batches are the same (fixed steps, single rows), else to rounding. Passes are as planned."""
    cases = {
        "fixed": {"rollout__trained_steps": {"steps": [0, 2]}},
        "single rows": {"rollout__trained_steps": {"queries": 2}, "rollout__micro_batch": 1},
        "queries": {"rollout__trained_steps": {"queries": 2}, "rollout__micro_batch": 3},
    }
    for name, changes in cases.items():
        weights, passes = [], []
        for shown in (True, False):
            monkeypatch.setattr(RunConfig, "shows_rollouts", lambda self, index, shown=shown: shown)
            config, parts = build_run(deepspeed="zero0", optimizer=SGD, **MODES[mode], **changes)
            start = parts.student.gather_weights(trainable_only=True)
            report = parts.trainer.run_round(0)
            weights.append(parts.student.gather_weights(trainable_only=True))
            passes.append(report.passes["forward"])
            assert bool(report.rolled) == shown
            if name == "fixed":
                planned = [one.forward for task in config.tasks for one in round_passes(config, task).values()]
                assert sum(planned) == passes[-1]
        assert passes[1] < passes[0] or (mode == "fused" and name != "fixed")
        scale = max(float((value - start[key]).abs().max()) for key, value in weights[0].items())
        for key, value in weights[0].items():
            if name == "queries":
                # ppo divides what rounding left of a log-ratio by the noise of a step: up to 1.3e-3, by the processor
                close = 1e-2 if mode == "ppo" else 1e-4
                torch.testing.assert_close(weights[1][key], value, rtol=0, atol=close * scale)
            else:
                assert torch.equal(weights[1][key], value), name
