"""LTX-Video against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd_ds.errors import UserError
from opd_ds.models import ModelFamily
from opd_ds.testing import family_checks as checks
from opd_ds.testing.tiny import ltx as tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("ltx") / "base")


def build(base: Path, dtype: torch.dtype = torch.float32, frames: int = 17) -> ModelFamily:
    return checks.build("ltx", base, dtype, height=64, width=96, frames=frames)


@pytest.fixture(scope="module")
def family(base: Path) -> ModelFamily:
    return build(base)


def test_it_draws_what_the_pipeline_draws(family: ModelFamily) -> None:
    assert family.latent_shape == (8, 3, 2, 3)
    sigmas = family.sigmas(4)
    assert sigmas[[0, -1]].tolist() == [1, 0]
    assert float(sigmas[-2]) == pytest.approx(0.1)  # shift_terminal
    plain, guided = (checks.check_parity(tiny, family, guidance) for guidance in (1.0, 4.0))
    assert not torch.allclose(plain, guided, atol=1e-2)
    assert family.decode(plain).shape == (4, 17, 3, 64, 96)


def test_a_decoder_that_denoises(tmp_path: Path) -> None:
    checks.check_parity(tiny, build(tiny.write(tmp_path / "base", timestep_conditioning=True)), 1.0)


def test_prompts_do_not_mix_and_need_no_mask_of_one_length(family: ModelFamily) -> None:
    checks.check_prompts_do_not_mix(family)
    checks.check_attention_masks(family)


def test_exports_draw_the_same_in_diffusers(family: ModelFamily, tmp_path: Path) -> None:
    checks.check_exports(tiny, family, tiny.write(tmp_path / "other", seed=1), tmp_path, 4.0)


def test_finite_at_both_ends(base: Path) -> None:
    assert checks.finite_at_both_ends(lambda dtype: build(base, dtype))


def test_refusals(base: Path) -> None:
    with pytest.raises(UserError, match="48x96: both must be multiples of 32"):
        checks.build("ltx", base, height=48, width=96)
    with pytest.raises(UserError, match=r"model.frames = 8: must be 8k \+ 1 .*nearest are 1 and 9"):
        build(base, frames=8)
