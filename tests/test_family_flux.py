"""FLUX.1 against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd_ds.errors import UserError
from opd_ds.testing import family_checks as checks
from opd_ds.testing.tiny import flux as tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("flux") / "base")


def test_it_draws_what_the_pipeline_draws(base: Path) -> None:
    family = checks.build("flux", base)
    checks.check_grid(family)
    plain, guided = (checks.check_parity(tiny, family, guidance) for guidance in (1.0, 3.5))
    assert not torch.allclose(plain, guided, atol=1e-2)
    checks.check_timesteps(tiny, "flux", base, 3.5)


def test_guidance_is_an_input_and_costs_no_pass(base: Path) -> None:
    family = checks.build("flux", base)
    network, cond, passes = family.load_transformer(), family.encode(checks.PROMPTS), []
    network.register_forward_pre_hook(lambda m, a, k: passes.append(k["guidance"].tolist()), with_kwargs=True)
    x, sigma = checks.noise(family).draw(slice(None)), torch.tensor([0.5, 0.9, 0.1, 0.3])
    family.guided_velocity(network, x, sigma, cond, cond[:1], 3.5)
    family.velocity(network, x, sigma, cond)
    assert passes == [[3.5] * 4, [1.0] * 4]
    assert family.passes(3.5) == 1


def test_schnell_is_drawn_without_guidance(tmp_path: Path) -> None:
    family = checks.build("flux", tiny.write(tmp_path / "schnell", guidance_embeds=False))
    checks.check_grid(family)
    checks.check_parity(tiny, family, 1.0)
    with pytest.raises(UserError, match=r"guidance = 3.5.*allowed: 1.0"):
        checks.roll_out(family, family.load_transformer(), 3.5)


def test_prompts_do_not_mix(base: Path) -> None:
    checks.check_prompts_do_not_mix(checks.build("flux", base))


def test_exports_draw_the_same_in_diffusers(base: Path, tmp_path: Path) -> None:
    checks.check_exports(tiny, checks.build("flux", base), tiny.write(tmp_path / "other", seed=1), tmp_path, 3.5)


def test_finite_at_both_ends(base: Path) -> None:
    assert checks.finite_at_both_ends(lambda dtype: checks.build("flux", base, dtype))


def test_refusals(base: Path, tmp_path: Path) -> None:
    checks.check_refusals("flux", base, tmp_path)
    tiny.write(tmp_path / "schnell", guidance_embeds=False)
    with pytest.raises(UserError, match="guidance_embeds = False, the student has True"):
        checks.build("flux", base).check_compatible(tmp_path / "schnell")
