"""The SD3 family against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from opd_ds.diffusion import kernel
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.diffusion.rollout import micro_batches, rollout
from opd_ds.errors import UserError
from opd_ds.models import build_family
from opd_ds.models.sd3 import SD3
from opd_ds.testing.tiny.sd3 import SIZES
from tests.tiny import PROMPTS, write_pipeline

CPU = torch.device("cpu")


def family(folder: Path, **settings: object) -> SD3:
    return SD3(folder, dtype=torch.float32, device=CPU, max_text_length=10, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dual_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD3.5's second attention in some blocks."""
    from dataclasses import replace

    sizes = replace(SIZES, dual_attention_layers=(0,))
    return write_pipeline(tmp_path_factory.mktemp("dual") / "base", seed=3, sizes=sizes)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("which", ["sd3", "sd35"])
def test_euler_rollout_gives_the_latents_and_pictures_of_diffusers(
    tiny_world: Path, dual_base: Path, which: str, guidance: float
) -> None:
    folder = tiny_world / "base" if which == "sd3" else dual_base
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    ours, seeds, prompts = family(folder), [1, 2, 3], PROMPTS[:3]
    call = {
        "prompt": prompts,
        "num_inference_steps": 10,
        "guidance_scale": guidance,
        "latents": SampleNoise(seeds, ours.latent_shape).draw(slice(None)),
        "max_sequence_length": 10,
        "height": 16,
        "width": 16,
    }
    expected = pipeline(output_type="latent", **call).images
    network, cond, uncond = ours.load_transformer(), ours.encode(prompts), ours.encode([""])
    with torch.no_grad():
        trajectory = rollout(
            lambda x, sigma, rows, step: ours.guided_velocity(
                network, x, sigma, cond.select(rows.device, rows.host), uncond, guidance
            ),
            SampleNoise(seeds, ours.latent_shape),
            kernel("euler").coefficients(ours.sigmas(10)),
            ours.sigmas(10),
            micro_batches([10, 10, 10], 2),
            device=CPU,
        )
    torch.testing.assert_close(trajectory.final, expected, rtol=0, atol=1e-4)
    pictures = torch.from_numpy(pipeline(output_type="np", **call).images).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours.decode(trajectory.final), pictures, rtol=0, atol=1e-4)


def test_offloaded_encoders_leave_and_give_the_same(tiny_world: Path) -> None:
    resident, offloaded = (family(tiny_world / "base", text_encoders=m) for m in ("resident", "offload"))
    first, second = resident.encode(PROMPTS), offloaded.encode(PROMPTS)
    assert torch.equal(first.tensors["embeds"], second.tensors["embeds"])
    assert torch.equal(first.tensors["pooled"], second.tensors["pooled"])
    assert first.tensors["embeds"].shape == (5, 20, 32)


def test_guidance_of_one_is_a_single_pass(tiny_world: Path) -> None:
    ours = family(tiny_world / "base")
    network, cond, uncond = ours.load_transformer(), ours.encode(PROMPTS[:2]), ours.encode([""])
    rows = []
    network.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["hidden_states"])), with_kwargs=True)
    x, sigma = torch.randn(2, *ours.latent_shape), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        plain = ours.guided_velocity(network, x, sigma, cond, uncond, 1.0)
        guided = ours.guided_velocity(network, x, sigma, cond, uncond, 3.0)
        alone = ours.guided_velocity(network, x[1:], sigma[1:], cond[slice(1, 2)], uncond, 3.0)
    assert rows == [2, 4, 2]
    assert not torch.allclose(plain, guided)
    torch.testing.assert_close(guided[1:], alone)  # a sigma per sample


def test_refusals(tiny_world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="StableDiffusion3Pipeline layout"):
        family(tmp_path)
    with pytest.raises(UserError, match="multiples of 4"):
        family(tiny_world / "base", height=18)
    with pytest.raises(UserError, match=r"model\.frames = 5: SD3 draws images"):
        family(tiny_world / "base", frames=5)
    with pytest.raises(UserError, match=r"'sd4'.*allowed: sd3"):
        build_family("sd4", tiny_world / "base", dtype=torch.float32, device=CPU)
