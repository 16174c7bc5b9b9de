"""Models that can be planned without their weights: their sizes, families and recipes."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import pytest
import torch

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import load_config
from opd_ds.config.schema import RunConfig
from opd_ds.errors import UserError
from opd_ds.plan.devices import parse_devices
from opd_ds.plan.memory import run_memory
from opd_ds.plan.network import count, find_model, known_configs, known_models
from opd_ds.runs.setup import Parts
from tests.tiny import costs_of

Build = Callable[..., tuple[RunConfig, Parts]]

# Parameters in 10^9, as the models' authors state them or their checkpoints hold; of SD3 with the table of positions.
PARAMETERS = {
    "stable-diffusion-3.5-medium": (2.24, 2.50),
    "stable-diffusion-3.5-large": (8.05, 8.15),
    "FLUX.1-dev": (11.88, 11.92),
    "stable-diffusion-3.5-large-turbo": (8.05, 8.15),
    "FLUX.1-Kontext-dev": (11.88, 11.92),
    "FLUX.2-klein-4B": (3.8, 4.1),
    "FLUX.2-klein-9B": (8.9, 9.3),
    "FLUX.2-dev": (31.5, 32.5),
    "Qwen-Image": (20.4, 20.5),
    "Qwen-Image-2512": (20.4, 20.5),
    "Qwen-Image-Edit": (20.4, 20.5),
    "Qwen-Image-Edit-2509": (20.4, 20.5),
    "Qwen-Image-Edit-2511": (20.4, 20.5),
    "Z-Image": (6.14, 6.17),
    "Z-Image-Turbo": (6.14, 6.17),
    "Wan2.1-T2V-1.3B-Diffusers": (1.29, 1.43),
    "Wan2.1-T2V-14B-Diffusers": (14.0, 14.4),
    "Wan2.2-TI2V-5B-Diffusers": (4.95, 5.05),
    "Wan2.1-I2V-14B-480P-Diffusers": (16.3, 16.5),
    "Wan2.2-T2V-A14B-Diffusers": (28.0, 28.8),  # both networks
    "LTX-Video": (1.9, 1.95),
}


RECIPES = {
    "sd3": "sd35m",
    "flux": "flux1",
    "flux_kontext": "flux1_kontext",
    "flux2": "flux2_klein",
    "flux2_dev": "flux1",
    "qwen_image": "qwen_image",
    "qwen_image_edit": "qwen_image",
    "qwen_image_edit_plus": "qwen_image",
    "z_image": "z_image",
    "wan": "wan21",
    "wan_a14b": "wan22_a14b",
    "wan_i2v": "wan21_i2v",
    "ltx": "ltx",
}


@pytest.mark.parametrize("name", known_models())
def test_known_models_have_the_parameters_of_the_real_ones(name: str) -> None:
    configs = known_configs(name)
    networks = [configs[part] for part in ("transformer", "transformer_2") if part in configs]
    with torch.device("meta"):
        modules = [getattr(diffusers, config["_class_name"]).from_config(config) for config in networks]
    low, high = PARAMETERS[name]
    found = count(torch.nn.ModuleList(modules))
    assert low < found.parameters / 1e9 < high
    if "3.5" in name:
        assert low < (found.parameters + found.buffers) / 1e9 < high


def test_a_hub_id_is_planned_from_the_configs_kept_here() -> None:
    model = find_model(load_config("mopd_sd35m", None, []))
    assert (model.transformer_class, model.family.latent_shape) == ("SD3Transformer2DModel", (16, 64, 64))
    assert model.tokens == 77 + 128
    assert 5.5e9 < model.encoders < 5.7e9


@pytest.mark.parametrize(
    ("name", "family", "latents"),
    [
        ("black-forest-labs/FLUX.1-dev", "flux", (16, 128, 128)),
        ("black-forest-labs/FLUX.1-Kontext-dev", "flux_kontext", (16, 128, 128)),
        ("black-forest-labs/FLUX.2-klein-4B", "flux2", (128, 64, 64)),
        ("Qwen/Qwen-Image", "qwen_image", (16, 128, 128)),
        ("Tongyi-MAI/Z-Image", "z_image", (16, 128, 128)),
        ("stabilityai/stable-diffusion-3.5-large-turbo", "sd3", (16, 128, 128)),
        ("black-forest-labs/FLUX.2-klein-9B", "flux2", (128, 64, 64)),
        ("Qwen/Qwen-Image-2512", "qwen_image", (16, 128, 128)),
        ("Qwen/Qwen-Image-Edit", "qwen_image_edit", (16, 128, 128)),
        ("Qwen/Qwen-Image-Edit-2511", "qwen_image_edit_plus", (16, 128, 128)),
        ("black-forest-labs/FLUX.2-dev", "flux2_dev", (128, 64, 64)),
        ("Tongyi-MAI/Z-Image-Turbo", "z_image", (16, 128, 128)),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "wan", (48, 21, 30, 52)),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan", (16, 21, 60, 104)),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "wan_a14b", (16, 21, 60, 104)),
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "wan_i2v", (16, 21, 60, 104)),
        ("Lightricks/LTX-Video", "ltx", (128, 21, 16, 22)),
    ],
)
def test_known_models_are_of_their_families(name: str, family: str, latents: tuple[int, ...]) -> None:
    size = "null" if family.startswith(("wan", "ltx")) else 1024
    changes = [f"model.path={name}", f"model.height={size}", f"model.width={size}", "model.frames=null"]
    changes.append(f"model.family={family}")
    model = find_model(load_config(f"mopd_{RECIPES[family]}", None, changes))
    assert known_configs(name.split("/")[1])["family"] == family
    assert model.family.latent_shape == latents
    assert model.tokens == {"sd3": 77 + 128, "ltx": 128}.get(family, 512)


@pytest.mark.parametrize(
    ("name", "recipe", "steps"),
    [
        ("stabilityai/stable-diffusion-3.5-large-turbo", "mopd_sd35m", 4),
        ("Tongyi-MAI/Z-Image-Turbo", "mopd_z_image", 8),
        ("black-forest-labs/FLUX.2-klein-9B", "mopd_flux2_klein", 4),
        ("Tongyi-MAI/Z-Image", "mopd_z_image", None),
    ],
)
def test_what_a_distilled_model_is_made_for_is_known(name: str, recipe: str, steps: int | None) -> None:
    assert find_model(load_config(recipe, None, [f"model.path={name}"])).distilled == steps


def test_guidance_that_a_model_does_not_know_has_no_plan() -> None:
    """Of klein its folder says so."""
    guided = load_config("mopd_flux2_klein", None, ["tasks.ocr.teacher.guidance=4.0"])
    with pytest.raises(
        UserError, match=r"^tasks\.ocr\.teacher\.guidance = 4: the model is distilled to be run without"
    ):
        find_model(guided)


def test_the_turbo_models_have_the_grids_of_their_schedulers() -> None:
    """Shift 3 of even sigmas, 3 s / (1 + 2 s); Z-Image's own shift is 6."""
    even = torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64)
    turbo, base = (
        find_model(load_config("mopd_z_image", None, [f"model.path=Tongyi-MAI/{name}"])).family.sigmas(4)
        for name in ("Z-Image-Turbo", "Z-Image")
    )
    torch.testing.assert_close(turbo, 3 * even / (1 + 2 * even), atol=1e-6, rtol=0)
    torch.testing.assert_close(base, 6 * even / (1 + 5 * even), atol=1e-6, rtol=0)


def test_cached_prompts_need_no_text_encoders(configured: Callable[..., DistilConfig]) -> None:
    def encoders(how: str) -> float:
        config = configured(model__text_encoders=how)
        memory = run_memory(config, costs_of(config), parse_devices("1xH100-80GB", "--gpus"))
        return sum(part.nbytes for part in (*memory.device, *memory.host) if part.name.startswith("text encoders"))

    assert encoders("cached") == 0
    assert encoders("offload") == 2 * encoders("resident") > 0


def test_unknown_models_are_refused_with_what_is_known(configured: Callable[..., DistilConfig]) -> None:
    with pytest.raises(UserError, match=r"somebody/something.*FLUX\.1-dev.*hf download"):
        find_model(configured(model__path="somebody/something"))
