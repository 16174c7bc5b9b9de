"""FLUX.1 Kontext against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from diffusers import FluxPipeline

from opd_ds.models.prompt_encoding import as_pixels
from opd_ds.testing import family_checks as checks
from opd_ds.testing.tiny import flux, flux_kontext
from opd_ds.testing.tiny.parts import painting
from tests.pictures import resized_by


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_kontext.write(tmp_path_factory.mktemp("kontext") / "base")


def test_it_draws_what_the_pipeline_draws(base: Path) -> None:
    family = checks.build("flux_kontext", base)
    edited = checks.check_parity(flux_kontext, family, 3.5)
    checks.check_timesteps(flux_kontext, "flux_kontext", base, 3.5)
    with patch.object(checks, "references", lambda family, count: [()] * count):
        unseen = checks.roll_out(family, family.load_transformer(), 3.5)
    assert not torch.allclose(edited, unseen, atol=1e-2)
    checks.close(unseen, checks.draw(flux, family, FluxPipeline(**checks.load_pipeline(family, base).components), 3.5))


@pytest.mark.parametrize("size", [(90, 72), (300, 1200), (1024, 1024), (1600, 900)])
def test_pictures_are_resized_as_the_pipeline_resizes_them(base: Path, size: tuple[int, int]) -> None:
    family = checks.build("flux_kontext", base, reference_side=None)
    picture = painting(0, size)
    _, pixels = resized_by(checks.load_pipeline(family, base), picture, "prepare_latents", 3)
    assert torch.equal(as_pixels(family.fit(picture)), pixels)
    smaller = checks.build("flux_kontext", base, reference_side=256).fit(picture)
    assert smaller.width * smaller.height == pytest.approx(256**2, rel=0.1)


def test_prompts_and_pictures_of_a_batch_do_not_mix(base: Path) -> None:
    checks.check_prompts_do_not_mix(checks.build("flux_kontext", base))


def test_exports_draw_the_same_in_diffusers(base: Path, tmp_path: Path) -> None:
    family = checks.build("flux_kontext", base)
    checks.check_exports(flux_kontext, family, flux_kontext.write(tmp_path / "other", seed=1), tmp_path, 3.5)
