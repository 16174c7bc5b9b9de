"""FLUX.2 klein against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd_ds.config.loading import parse_config
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.models import ModelFamily
from opd_ds.runs.setup import prepare
from opd_ds.testing import family_checks as checks
from opd_ds.testing.tiny import flux2 as tiny
from tests.tiny import run_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("flux2") / "base")


def test_it_draws_what_the_pipeline_draws(base: Path) -> None:
    """With two reference pictures of several proportions, and without any."""
    family = checks.build("flux2", base)
    checks.check_grid(family)
    plain, guided = (checks.check_parity(tiny, family, guidance) for guidance in (1.0, 4.0))
    assert not torch.allclose(plain, guided, atol=2e-3)  # most tokens are of pictures
    checks.check_timesteps(tiny, "flux2", base, 4.0)


def test_prompts_do_not_mix(base: Path) -> None:
    checks.check_prompts_do_not_mix(checks.build("flux2", base))


def test_exports_draw_the_same_in_diffusers(base: Path, tmp_path: Path) -> None:
    checks.check_exports(tiny, checks.build("flux2", base), tiny.write(tmp_path / "other", seed=1), tmp_path, 4.0)


def test_finite_at_both_ends(base: Path) -> None:
    assert checks.finite_at_both_ends(lambda dtype: checks.build("flux2", base, dtype))


def test_the_distilled_model_is_drawn_without_guidance(tmp_path: Path) -> None:
    family = checks.build("flux2", tiny.write(tmp_path / "klein", is_distilled=True))
    checks.check_parity(tiny, family, 1.0)
    with pytest.raises(UserError, match=r"guidance = 4: .*allowed: 1.0"):
        checks.roll_out(family, family.load_transformer(), 4.0)


def test_a_guidance_that_it_does_not_know_is_found_before_weights_load(
    tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    klein = tiny.write(tmp_path / "klein", is_distilled=True)
    monkeypatch.setattr(ModelFamily, "load_transformer", lambda *_: pytest.fail("a network was loaded"))
    (tmp_path / "prompts.txt").write_text("a red 3\n")
    task = {"teacher": {"path": str(klein), "guidance": 2.0}, "prompts": str(tmp_path / "prompts.txt")}
    model = {"family": "flux2", "path": str(klein)}
    settings = run_settings(tmp_path, tmp_path / "out", model=model, rollout__guidance=1.0, tasks={"one": task})
    with pytest.raises(UserError, match=r"^tasks\.one\.teacher\.guidance = 2: .*allowed: 1\.0"):
        prepare(parse_config(settings), group)


def test_refusals(base: Path, tmp_path: Path) -> None:
    checks.check_refusals("flux2", base, tmp_path)
    dev = tiny.write(tmp_path / "dev")
    checks.change(dev / "model_index.json", _class_name="Flux2Pipeline")
    with pytest.raises(UserError, match=r"a Flux2Pipeline, but this family is of Flux2KleinPipeline; .*flux2_dev is"):
        checks.build("flux2", dev)
