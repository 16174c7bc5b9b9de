"""Qwen-Image-Edit against diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline

from opd_ds.models import ModelFamily
from opd_ds.models.prompt_encoding import as_pixels
from opd_ds.testing import family_checks as checks
from opd_ds.testing.tiny import qwen_image
from opd_ds.testing.tiny.parts import painting
from tests.pictures import resized_by

NAMES = ("qwen_image_edit", "qwen_image_edit_plus")


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    """One picture a prompt, or two of several proportions."""
    base = checks.tiny_module(request.param).write(tmp_path_factory.mktemp(request.param) / "base")
    return checks.build(request.param, base, max_text_length=64)


def name(family: ModelFamily) -> str:
    return NAMES[family.takes_pictures > 1]


def test_it_draws_what_the_pipeline_draws(family: ModelFamily) -> None:
    tiny = checks.tiny_module(name(family))
    plain, guided = (checks.check_parity(tiny, family, guidance) for guidance in (1.0, 4.0))
    assert not torch.allclose(plain, guided, atol=1e-2)


def test_prompts_without_pictures_are_drawn_as_by_qwen_image(family: ModelFamily) -> None:
    with patch.object(checks, "references", lambda family, count: [()] * count):
        unseen = checks.roll_out(family, family.load_transformer(), 4.0)
    parts = checks.load_pipeline(family, family.path).components
    parts.pop("processor")
    checks.close(unseen, checks.draw(qwen_image, family, QwenImagePipeline(**parts), 4.0))


def test_both_passes_of_guidance_see_the_pictures(family: ModelFamily) -> None:
    """The text encoder does, and the network."""
    cond, uncond = checks.encode(family, checks.PROMPTS)
    assert not torch.allclose(uncond.tensors["embeds"][0], uncond.tensors["embeds"][1], atol=1e-3)
    heard: list[int] = []
    network, x = family.load_transformer(), checks.noise(family).draw(slice(None))
    network.register_forward_pre_hook(lambda m, a, k: heard.append(k["hidden_states"].shape[1]), with_kwargs=True)
    with torch.no_grad():
        family.guided_velocity(network, x, torch.full((4,), 0.5), cond, uncond, 4.0)
    own = sum(latents[0].numel() for latents in cond.references[0]) // 4
    assert heard == [family.latent_shape[1] * family.latent_shape[2] // 4 + own] * 2


@pytest.mark.parametrize("size", [(90, 72), (300, 1200), (1600, 900)])
def test_pictures_are_resized_as_the_pipeline_resizes_them(family: ModelFamily, size: tuple[int, int]) -> None:
    whole = checks.build(name(family), family.path, reference_side=None)
    picture = painting(0, size)
    shown, encoded = resized_by(checks.load_pipeline(family, family.path), picture, "prepare_latents", 2)
    pixels, seen = (one[0] if isinstance(one, list) else one for one in (encoded, shown))
    assert torch.equal(as_pixels(whole.fit(picture)), pixels.squeeze(2))
    assert np.array_equal(np.asarray(whole.shown(picture)), np.asarray(seen))  # type: ignore[attr-defined]


def test_prompts_and_pictures_of_a_batch_do_not_mix(family: ModelFamily) -> None:
    checks.check_prompts_do_not_mix(family)


def test_exports_draw_the_same_in_diffusers(family: ModelFamily, tmp_path: Path) -> None:
    tiny = checks.tiny_module(name(family))
    checks.check_exports(tiny, family, tiny.write(tmp_path / "other", seed=1), tmp_path, 4.0)
