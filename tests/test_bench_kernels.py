"""`python -m benchmarks kernels` and `cached-guidance`: what they compare, on one family and few prompts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.cached_guidance import Cached, _Drawing
from benchmarks.cached_guidance import as_markdown as cached_table
from benchmarks.family_trial import Trial
from benchmarks.kernels import COMPILED, as_markdown, changes
from opd_ds.config.paths import resolve_path
from opd_ds.testing import family_checks as checks


@pytest.mark.extended
def test_kernels_and_compiled_blocks_beside_the_plain_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = []
    for name in ("flux", "sd3"):
        trial = Trial(name, tmp_path / name)
        trial.write()
        found += list(changes(trial))
    torch._dynamo.reset()
    assert [(one.family, one.what, bool(one.refused)) for one in found] == [
        ("flux", "native", False), ("flux", "math", False), ("flux", COMPILED, False),
        ("sd3", "native", True), ("sd3", "math", True), ("sd3", COMPILED, False),
    ]  # fmt: skip
    assert all(max(one.velocity, one.gradient) < 1e-5 for one in found)
    by_what = {one.what: one for one in found if one.family == "flux"}
    assert by_what["native"].kept == 1  # it is what `auto` takes on a CPU
    assert by_what["math"].kept > 1.5  # it keeps the weights of attention
    assert "| sd3 | - | - | - | - | - | - | " in as_markdown(found)


def test_states_of_cached_guidance_are_measured_from_the_same_noise() -> None:
    base = resolve_path("package:miniature/assets/miniature_base", "model.path")
    family = checks.build("sd3", base, height=None, width=None, max_text_length=10)
    draw = _Drawing(family, ["a red 3 on blue", "the number 5"], 4)
    with torch.no_grad():
        exact = draw.states(3.0, 1)
        assert torch.equal(draw.states(3.0, 1), exact)
        cached, free = draw.states(3.0, 2), draw.states(1.0, 1)
    # The first step, and the noise before it, have the direction of their own.
    assert torch.equal(cached[:, :2], exact[:, :2])
    off = float((cached - exact).norm() / (free - exact).norm())
    assert 0.001 < off < 0.5


def test_a_row_says_what_is_saved_and_lost() -> None:
    table = cached_table([Cached(2.0, 3, 14, 0.25, 0.125, {"text": (0.5, 0.01)})])
    assert "| 2 | 3 | 14 | 25.0% | 12.5% | 0.500 ±0.010 |" in table
