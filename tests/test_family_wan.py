"""The Wan family against diffusers' own pipeline: latents, frames, prompts of several lengths, saved models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from peft import LoraConfig
from torch import Tensor

from opd_ds.config.algorithms import DistilConfig
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.models import lora
from opd_ds.models.wan import Wan
from opd_ds.runs.setup import prepare
from opd_ds.testing.family_checks import trajectory
from opd_ds.testing.tiny import wan
from opd_ds.testing.tiny.parts import save
from tests.tiny import ALL_SHARDED

CPU = torch.device("cpu")
# The latents of 9 frames are 3; a wide image, so that no pair of dimensions could be confused.
SIZE: dict[str, Any] = {"height": 64, "width": 96, "frames": 9, "max_text_length": 20}
# The last one is cut.
PROMPTS = ["a red 3 on blue", "a 5", "a green 7 on white beside a red 3 on blue, the number 5, a neat 8, and some more"]
SEEDS, STEPS = [1, 2, 3], 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan.write(tmp_path_factory.mktemp("wan") / "base")


@pytest.fixture(scope="module")
def pipeline(base: Path) -> Any:
    return quiet(WanPipeline.from_pretrained(base))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def family(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Wan:
    return Wan(folder, dtype=dtype, device=CPU, **SIZE | settings)


def noise(ours: Wan) -> SampleNoise:
    return SampleNoise(SEEDS, ours.latent_shape)


def rolled(ours: Wan, network: Any, guidance: float, prompts: list[str] = PROMPTS, count: int = 3) -> Tensor:
    return trajectory(ours, network, prompts, SampleNoise(SEEDS[:count], ours.latent_shape), guidance, STEPS).final


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_euler_draws_the_latents_and_the_frames_of_diffusers(base: Path, pipeline: Any, guidance: float) -> None:
    ours = family(base)
    assert ours.latent_shape == (4, 3, 8, 12)
    expected = wan.draw(pipeline, ours, PROMPTS, noise(ours).draw(slice(None)), guidance, STEPS)
    final = rolled(ours, ours.load_transformer(), guidance)
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-4)
    if guidance > 1:
        assert (final - rolled(ours, ours.load_transformer(), 1.0)).abs().max() > 1e-2
    videos = pipeline.vae.decode(_denormalized(pipeline.vae, expected), return_dict=False)[0]
    videos = pipeline.video_processor.postprocess_video(videos, output_type="pt")  # [B, F, 3, H, W]
    assert videos.shape == (3, 9, 3, 64, 96)
    torch.testing.assert_close(ours.decode(final), videos, rtol=0, atol=1e-4)
    assert (videos[:, 1:] - videos[:, :-1]).abs().amax((0, 2, 3, 4)).min() > 1e-2


def _denormalized(vae: Any, latents: Tensor) -> Tensor:
    """As the pipeline has it, before it decodes."""
    mean = torch.tensor(vae.config.latents_mean).view(1, vae.config.z_dim, 1, 1, 1)
    inverse = 1.0 / torch.tensor(vae.config.latents_std).view(1, vae.config.z_dim, 1, 1, 1)
    return latents / inverse + mean


def test_a_timestep_for_every_token_is_the_same_as_one(base: Path, pipeline: Any, tmp_path: Path) -> None:
    """As in Wan 2.2 TI2V-5B, whose pipeline expands the timestep for images that are given."""
    folder = shutil.copytree(base, tmp_path / "expanded")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"expand_timesteps": True}))
    expanding, ours = quiet(WanPipeline.from_pretrained(folder)), family(folder)
    assert expanding.config.expand_timesteps
    expected = wan.draw(expanding, ours, PROMPTS, noise(ours).draw(slice(None)), 4.0, STEPS)
    torch.testing.assert_close(rolled(ours, ours.load_transformer(), 4.0), expected, rtol=0, atol=1e-4)


def test_the_vae_with_patches_of_wan_22(tmp_path: Path) -> None:
    """TI2V-5B as a text-to-video model: 16 x 16 pixels a latent, 24 frames a second."""
    pipeline = wan.make(0, patched_vae=True)
    ours = family(save(pipeline, tmp_path / "base"))
    assert (ours.latent_shape, ours.size_unit, ours.fps) == ((4, 3, 4, 6), 32, 24.0)
    pipeline = quiet(WanPipeline.from_pretrained(tmp_path / "base"))
    assert pipeline.config.expand_timesteps
    expected = wan.draw(pipeline, ours, PROMPTS, noise(ours).draw(slice(None)), 4.0, STEPS)
    final = rolled(ours, ours.load_transformer(), 4.0)
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-4)
    videos = pipeline.vae.decode(_denormalized(pipeline.vae, expected), return_dict=False)[0]
    videos = pipeline.video_processor.postprocess_video(videos, output_type="pt")
    assert videos.shape == (3, 9, 3, 64, 96)
    torch.testing.assert_close(ours.decode(final), videos, rtol=0, atol=1e-4)


def test_tiles_are_decoded_as_by_a_pipeline_that_is_told_so(base: Path) -> None:
    size = {"height": 320, "width": 16, "frames": 5}
    whole, tiled = family(base, **size), family(base, **size, vae_tiling=True)
    latents = SampleNoise([1], whole.latent_shape).draw(slice(None))
    pipeline = WanPipeline.from_pretrained(base)
    pipeline.vae.enable_tiling()
    videos = pipeline.vae.decode(_denormalized(pipeline.vae, latents), return_dict=False)[0]
    videos = pipeline.video_processor.postprocess_video(videos, output_type="pt")
    torch.testing.assert_close(tiled.decode(latents), videos, rtol=0, atol=1e-4)
    assert (whole.decode(latents) - videos).abs().max() > 1e-3


def test_prompts_of_several_lengths_are_encoded_and_drawn_as_alone(base: Path) -> None:
    ours = family(base)
    together = ours.encode(PROMPTS)
    lengths = together.tensors["mask"].sum(1).tolist()
    assert lengths[1] < lengths[0] < lengths[2] == SIZE["max_text_length"]
    for row, prompt in enumerate(PROMPTS):
        alone = ours.encode([prompt]).tensors["embeds"]
        assert alone.shape[1] == lengths[row]  # no padding is kept
        torch.testing.assert_close(together.tensors["embeds"][row, : lengths[row]], alone[0], rtol=0, atol=1e-5)
        assert not together.tensors["embeds"][row, lengths[row] :].any()
    network = ours.load_transformer()
    final = rolled(ours, network, 4.0)
    torch.testing.assert_close(rolled(ours, network, 4.0, PROMPTS[:1], 1), final[:1], rtol=0, atol=1e-5)
    assert (rolled(ours, network, 4.0, PROMPTS[1:2], 1) - final[:1]).abs().max() > 1e-3


def test_saved_networks_and_loras_draw_the_same_in_diffusers(base: Path, pipeline: Any, tmp_path: Path) -> None:
    ours, network = family(base), family(wan.write(tmp_path / "other", seed=5)).load_transformer()
    start = noise(ours).draw(slice(None))
    plain = wan.draw(pipeline, ours, PROMPTS, start, 4.0, STEPS)

    ours.save_full(network.state_dict(), tmp_path / "full")
    saved = quiet(WanPipeline.from_pretrained(tmp_path / "full"))
    expected = rolled(ours, network, 4.0)
    assert (expected - plain).abs().max() > 1e-1
    torch.testing.assert_close(wan.draw(saved, ours, PROMPTS, start, 4.0, STEPS), expected, rtol=0, atol=1e-4)

    torch.manual_seed(0)
    network = ours.load_transformer()
    config = LoraConfig(r=4, lora_alpha=12, target_modules=list(ours.lora_targets))
    lora.new_adapter(network, "student", config)
    for parameter in lora.adapter_parameters(network, "student").values():
        torch.nn.init.normal_(parameter, std=0.1)
    adapter = lora.strip_adapter_name(network.state_dict())
    assert {key.split(".")[2] for key in adapter} == {"attn1", "attn2"}
    ours.save_lora(adapter, lora.adapter_config(network, "student"), tmp_path / "lora")
    expected = rolled(ours, network, 4.0)
    assert (expected - plain).abs().max() > 1e-2
    pipeline.load_lora_weights(tmp_path / "lora")
    drawn = wan.draw(pipeline, ours, PROMPTS, start, 4.0, STEPS)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocities_are_finite_at_both_ends(base: Path, dtype: torch.dtype) -> None:
    ours = family(base, dtype)
    network = ours.load_transformer()
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    assert {buffer.dtype for buffer in network.buffers()} == {torch.float32}  # positions keep their precision
    with torch.no_grad():
        for sigma in (1.0, 0.0):
            velocity = ours.velocity(
                network, noise(ours).draw(slice(None)), torch.full((3,), sigma), ours.encode(PROMPTS)
            )
            assert velocity.dtype == dtype
            assert velocity.isfinite().all()


def test_in_bf16_a_student_that_is_its_own_teacher_has_loss_0(base: Path, group: Group, tmp_path: Path) -> None:
    """Though diffusers would keep some of the teacher's layers in float32, and DeepSpeed none of the student's."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = DistilConfig.model_validate(
        {
            "run": {"rounds": 1, "output_dir": str(tmp_path / "out")},
            "model": {"family": "wan", "path": str(base), **SIZE},
            "precision": "bf16",
            "deepspeed": ALL_SHARDED,
            "rollout": {"samples": 2, "steps": 2, "guidance": 3.0},
            "tasks": {"self": {"teacher": {"path": str(base), "guidance": 3.0}, "prompts": f"{tmp_path}/prompts.txt"}},
        }
    )
    losses = prepare(config, group).trainer.run_round(0).losses
    assert losses.loss == 0


def test_the_grid_is_that_of_the_folders_scheduler(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "unipc")
    unipc = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction")
    unipc.save_pretrained(folder / "scheduler")
    for where, first in ((base, 1.0), (folder, 1 - 1e-6)):
        sigmas = family(where).sigmas(10)
        assert sigmas.shape == (11,)
        assert sigmas.dtype == torch.float64
        assert float(sigmas[0]) == pytest.approx(first, abs=1e-7)
        assert float(sigmas[-1]) == 0
        assert bool((sigmas[:-1] > sigmas[1:]).all())
    unipc.set_timesteps(10)
    assert torch.equal(family(folder).sigmas(10), unipc.sigmas.double())
    other = shutil.copytree(folder, tmp_path / "other")
    UniPCMultistepScheduler.from_config(unipc.config, flow_shift=3.0).save_pretrained(other / "scheduler")
    with pytest.raises(UserError, match=r"flow_shift = 3.0, the student has 5.0"):
        family(folder).check_compatible(other)


def test_refusals(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="72x96: both must be multiples of 16"):
        family(base, height=72)
    for frames, nearest in ((8, "5 and 9"), (2, "1 and 5"), (12, "9 and 13")):
        with pytest.raises(UserError, match=rf"model.frames = {frames}: must be 4k \+ 1 .*nearest are {nearest}"):
            family(base, frames=frames)
    assert family(base, height=None, width=None, frames=None).latent_shape == (4, 21, 60, 104)
    assert family(base, frames=1).latent_shape == (4, 1, 8, 12)

    def changed(name: str, file: str, **fields: Any) -> Path:
        folder = shutil.copytree(base, tmp_path / name)
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))
        return folder

    two = changed("two", "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.875)
    with pytest.raises(UserError, match=r"transformer_2, boundary_ratio = 0\.875.*model.family = 'wan_a14b'"):
        family(two)
    with pytest.raises(UserError, match="takes an image beside the text"):
        family(changed("i2v", "transformer/config.json", in_channels=36))
    with pytest.raises(UserError, match=r"its scheduler .UniPCMultistepScheduler. has no fixed flow-matching grid"):
        family(changed("ddpm", "scheduler/scheduler_config.json", _class_name="UniPCMultistepScheduler"))
