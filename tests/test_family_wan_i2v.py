"""Wan 2.1 image to video against diffusers' own pipeline, each prompt with a picture of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd_ds.errors import UserError
from opd_ds.models import ModelFamily, build_family
from opd_ds.testing import family_checks as checks
from opd_ds.testing.tiny import wan
from opd_ds.testing.tiny import wan_i2v as tiny
from opd_ds.testing.tiny.parts import references


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("wan_i2v") / "base")


def build(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> ModelFamily:
    settings = {"height": 32, "width": 48, "frames": 9, "text_encoders": "resident"} | settings
    return build_family("wan_i2v", folder, dtype=dtype, device=checks.CPU, **settings)


@pytest.fixture(scope="module")
def family(base: Path) -> ModelFamily:
    return build(base)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_euler_draws_the_latents_of_diffusers(family: ModelFamily, guidance: float) -> None:
    assert family.latent_shape == (4, 3, 4, 6)
    pipeline, network = checks.load_pipeline(family, family.path), family.load_transformer()
    final = checks.roll_out(family, network, guidance)
    checks.close(final, checks.draw(tiny, family, pipeline, guidance))
    assert family.decode(final).shape == (4, 9, 3, 32, 48)


def test_the_picture_is_encoded_for_network_and_attention(family: ModelFamily) -> None:
    pictures = references(family, 2)
    cond = family.encode(["a", "b"], pictures)
    (given,) = cond.stacked_references()
    assert given.shape == (2, 8, 3, 4, 6)
    assert given[:, :4, 0].min() == 1
    assert given[:, :4, 1:].max() == 0
    assert cond.tensors["picture"].shape == (2, 257, 16)
    for part in (given, cond.tensors["picture"]):
        assert (part[0] - part[1]).abs().max() > 1e-2
    assert build(family.path, frames=5).picture_name(pictures[0][0]) != family.picture_name(pictures[0][0])


def test_exports_draw_the_same_in_diffusers(family: ModelFamily, tmp_path: Path) -> None:
    checks.check_exports(tiny, family, tiny.write(tmp_path / "other", seed=1), tmp_path, 3.5)


def test_finite_at_both_ends(base: Path) -> None:
    assert checks.finite_at_both_ends(lambda dtype: build(base, dtype))


def test_refusals(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one that takes a first frame has 12 and CLIP's width"):
        build(wan.write(tmp_path / "plain"))
    with pytest.raises(UserError, match="takes an image beside the text"):
        build_family("wan", base, dtype=torch.float32, device=checks.CPU)
    with pytest.raises(UserError, match=r"model\.max_text_length = 20: must be 512"):
        build(base, max_text_length=20)
