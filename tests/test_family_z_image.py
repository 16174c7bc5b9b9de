"""Z-Image against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd_ds.models import ModelFamily
from opd_ds.testing import family_checks as checks
from opd_ds.testing.tiny import z_image as tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("z_image") / "base")


@pytest.fixture(scope="module")
def family(base: Path) -> ModelFamily:
    return checks.build("z_image", base, max_text_length=64)


def test_it_draws_what_the_pipeline_draws(family: ModelFamily) -> None:
    checks.check_grid(family)
    plain, guided = (checks.check_parity(tiny, family, guidance) for guidance in (1.0, 4.0))
    assert not torch.allclose(plain, guided, atol=1e-2)


def test_guidance_is_the_pipelines_scale_plus_one(family: ModelFamily) -> None:
    network, cond, rows = family.load_transformer(), family.encode(checks.PROMPTS), []
    network.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["x"])), with_kwargs=True)
    x, sigma = checks.noise(family).draw(slice(None)), torch.tensor([0.5, 0.9, 0.1, 0.3])
    with torch.no_grad():
        for guidance in (1.0, 1.5):
            family.guided_velocity(network, x, sigma, cond, family.encode([""]), guidance)
    assert rows == [4, 4, 4]  # guided in two calls: texts of one length need no mask
    uncond, own = torch.randn(2, 1, *family.latent_shape)
    torch.testing.assert_close(family.combine(uncond, own, 3.0), own + 2.0 * (own - uncond))


def test_texts_are_as_long_as_they_are_and_prompts_stay_untouched(family: ModelFamily) -> None:
    prompts = ["", "a", checks.PROMPTS[1]]
    cond = family.encode(prompts)
    short, longer, longest = lengths = cond.tensors["mask"].sum(1).tolist()
    assert longer == short + 1
    assert longest > 32 > longer  # the network fills texts up to multiples of 32
    assert not cond.tensors["embeds"][~cond.tensors["mask"]].any()
    assert prompts == ["", "a", checks.PROMPTS[1]]
    network, seen = family.load_transformer(), []
    network.register_forward_pre_hook(lambda m, a, k: seen.extend(map(len, k["cap_feats"])), with_kwargs=True)
    with torch.no_grad():
        family.velocity(network, checks.noise(family).draw(slice(3)), torch.ones(3), cond)
    assert seen == lengths


def test_attention_has_no_mask_where_all_prompts_are_equally_long(family: ModelFamily) -> None:
    checks.check_attention_masks(family)


def test_prompts_do_not_mix(family: ModelFamily) -> None:
    checks.check_prompts_do_not_mix(family)


def test_exports_draw_the_same_in_diffusers(family: ModelFamily, tmp_path: Path) -> None:
    checks.check_exports(tiny, family, tiny.write(tmp_path / "other", seed=1), tmp_path, 4.0)


def test_finite_at_both_ends(base: Path) -> None:
    assert checks.finite_at_both_ends(lambda dtype: checks.build("z_image", base, dtype))


def test_refusals(base: Path, tmp_path: Path) -> None:
    checks.check_refusals("z_image", base, tmp_path)
