"""Qwen-Image against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd_ds.config.loading import load_config
from opd_ds.config.sections import ModelSection
from opd_ds.errors import UserError
from opd_ds.models import ModelFamily
from opd_ds.models.qwen_image import pack, unpack
from opd_ds.plan.network import find_model
from opd_ds.runs.encodings import Wanted
from opd_ds.testing import family_checks as checks
from opd_ds.testing.tiny import qwen_image as tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("qwen_image") / "base")


@pytest.fixture(scope="module")
def family(base: Path) -> ModelFamily:
    return checks.build("qwen_image", base, max_text_length=64)


def test_it_draws_what_the_pipeline_draws(family: ModelFamily) -> None:
    checks.check_grid(family)
    assert float(family.sigmas(checks.STEPS)[-2]) == pytest.approx(0.02, rel=1e-5)  # the scheduler's shift_terminal
    plain, guided = (checks.check_parity(tiny, family, guidance) for guidance in (1.0, 4.0))
    assert not torch.allclose(plain, guided, atol=1e-2)


def test_the_negative_prompt_is_a_blank_unless_something_else_is_given(base: Path, family: ModelFamily) -> None:
    """As the model's card and public code; without one the pipeline does not guide."""
    given = [checks.build("qwen_image", base, negative_prompt=text).negative_prompt for text in (None, "", "ugly")]
    assert given == [" ", "", "ugly"]
    assert family.encode([" "]).lengths != family.encode([""]).lengths
    assert [text for text, _ in Wanted.of(ModelSection(path="x"), family, []).texts.values()] == [" "]
    for value, expected in (("null", " "), ('""', "")):
        config = load_config("mopd_qwen_image", None, [f"model.negative_prompt={value}", "model.path=hub/Qwen-Image"])
        assert find_model(config).family.negative_prompt == expected


def test_the_instruction_before_the_prompt_is_dropped(family: ModelFamily) -> None:
    """What is left of "" is the end of the template; the tiny tokenizer counts the instruction as the real one does."""
    cond = family.encode(["", "a"])
    assert cond.tensors["mask"].sum(1).tolist() == [5, 6]
    assert cond.tensors["embeds"].shape == (2, 6, 32)
    assert not cond.tensors["embeds"][0, 5].any()
    assert family.encode(["a", "b"]).tensors["mask"].all()  # equally long: the pipeline gives no mask


def test_guidance_keeps_the_norm_of_every_token(family: ModelFamily) -> None:
    uncond, cond = torch.randn(2, 2, *family.latent_shape)
    combined = family.combine(uncond, cond, 3.0)
    torch.testing.assert_close(pack(combined).norm(dim=-1), pack(cond).norm(dim=-1))
    assert not torch.allclose(combined, cond, atol=0.1)


def test_tokens_are_the_pipelines(family: ModelFamily) -> None:
    latents = checks.noise(family).draw(slice(None))
    pipeline = checks.load_pipeline(family, family.path)
    assert torch.equal(pack(latents), pipeline._pack_latents(latents, *latents.shape))
    assert torch.equal(unpack(pack(latents), *latents.shape[2:]), latents)


def test_attention_has_no_mask_where_all_prompts_are_equally_long(family: ModelFamily) -> None:
    checks.check_attention_masks(family)


def test_prompts_do_not_mix(family: ModelFamily) -> None:
    checks.check_prompts_do_not_mix(family)


def test_exports_draw_the_same_in_diffusers(family: ModelFamily, tmp_path: Path) -> None:
    checks.check_exports(tiny, family, tiny.write(tmp_path / "other", seed=1), tmp_path, 4.0)


def test_finite_at_both_ends(base: Path) -> None:
    assert checks.finite_at_both_ends(lambda dtype: checks.build("qwen_image", base, dtype))


def test_refusals(base: Path, family: ModelFamily, tmp_path: Path) -> None:
    checks.check_refusals("qwen_image", base, tmp_path)
    other = tiny.write(tmp_path / "other")
    checks.change(other / "scheduler" / "scheduler_config.json", shift_terminal=None)
    with pytest.raises(UserError, match=r"shift_terminal = None, the student has 0\.02"):
        family.check_compatible(other)
    checks.change(other / "scheduler" / "scheduler_config.json", shift_terminal=0.02)
    checks.change(other / "vae" / "config.json", latents_mean=[0.0] * 4)
    with pytest.raises(UserError, match="latents_mean"):
        family.check_compatible(other)
