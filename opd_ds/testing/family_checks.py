"""What every model family has to do: behave as diffusers' pipeline of the same folder. For tests and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional

from opd_ds.diffusion import kernel
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.diffusion.rollout import Keep, Trajectory, rollout
from opd_ds.errors import UserError
from opd_ds.models import Conditioning, ModelFamily, build_family, lora
from opd_ds.testing.tiny.parts import references

CPU = torch.device("cpu")
PROMPTS = ["a red 3 on blue", "a neat 8 beside a black square on a white square", "the number 5", "a green 7"]
STEPS = 4


def tiny_module(name: str) -> ModuleType:
    """The module that writes the family's tiny pipelines; ModuleNotFoundError where there is none."""
    return import_module(f"opd_ds.testing.tiny.{name}")


def model_settings(name: str) -> dict[str, Any]:
    """What a run with the family's tiny pipeline sets beside its size, so that reference pictures are small."""
    return getattr(tiny_module(name), "SETTINGS", {})


def build(name: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> ModelFamily:
    """Images are wider than high, so that the two cannot be confused; reference pictures are small."""
    usual = {"height": 16, "width": 24, "max_text_length": 24, "text_encoders": "resident", **model_settings(name)}
    return build_family(name, folder, dtype=dtype, device=CPU, **usual | settings)


def load_pipeline(family: ModelFamily, folder: Path) -> Any:
    missing = {name: part for name, part in family.given_parts().items() if part is not None}
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(folder, **missing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_lora(family: ModelFamily, pipeline: Any, folder: Path) -> None:
    """What `family.save_lora` wrote, as diffusers' users load it."""
    if len(family.networks) == 1:
        pipeline.load_lora_weights(folder)
        return
    for part in folder.iterdir():
        pipeline.load_lora_weights(part, load_into_transformer_2=part.name == family.networks[1])


def noise(family: ModelFamily) -> SampleNoise:
    """One noise a prompt of `PROMPTS`."""
    return SampleNoise(list(range(len(PROMPTS))), family.latent_shape)


def encode(family: ModelFamily, prompts: list[str]) -> tuple[Conditioning, Conditioning]:
    """Prompts, with reference pictures where the family takes any, and what guidance holds against them."""
    pictures = references(family, len(prompts))
    cond = family.encode(prompts, pictures)
    negative = [family.negative_prompt]
    return cond, family.encode(negative * len(prompts), pictures) if family.sees_pictures else family.encode(negative)


@torch.no_grad()
def trajectory(
    family: ModelFamily,
    network: Any,
    prompts: list[str],
    noise: SampleNoise,
    guidance: float,
    steps: int,
    keep: torch.dtype | None = None,
) -> Trajectory:
    """A network's `euler` rollout, with the family's negative prompt. States are kept where `keep` names a dtype."""
    (cond, uncond), sigmas = encode(family, prompts), family.sigmas(steps)
    stages = family.stages(sigmas)
    return rollout(
        lambda x, sigma, rows, step: family.guided_velocity(network, x, sigma, cond, uncond, guidance, stages[step]),
        noise,
        kernel("euler").coefficients(sigmas),
        sigmas,
        device=family.device,
        keep=None if keep is None else Keep(torch.arange(steps).expand(len(prompts), -1), keep),
    )


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def roll_out(family: ModelFamily, network: nn.Module, guidance: float) -> Tensor:
    """Our final latents."""
    return trajectory(family, network, PROMPTS, noise(family), guidance, STEPS).final


def draw(tiny: ModuleType, family: ModelFamily, pipeline: Any, guidance: float, **options: Any) -> Tensor:
    """The pipeline's final latents of the same noise; `tiny` is the family's module."""
    return tiny.draw(pipeline, family, PROMPTS, noise(family).draw(slice(None)), guidance, STEPS, **options)


def check_parity(tiny: ModuleType, family: ModelFamily, guidance: float) -> Tensor:
    """Latents and images are the pipeline's; returns the latents."""
    pipeline = load_pipeline(family, family.path)
    final = roll_out(family, family.load_transformer(), guidance)
    close(final, draw(tiny, family, pipeline, guidance))
    pictures = draw(tiny, family, pipeline, guidance, pictures=True)
    close(family.decode(final), pictures)
    assert pictures.std() > 0.01
    return final


def check_grid(family: ModelFamily) -> None:
    sigmas = family.sigmas(STEPS)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (STEPS + 1,)
    assert (sigmas.diff() < 0).all()
    assert sigmas[[0, -1]].tolist() == [1, 0]


def check_timesteps(tiny: ModuleType, name: str, folder: Path, guidance: float) -> None:
    """In bf16, which rounds them coarsely, the network hears of the same timesteps as in the pipeline."""
    family = build(name, folder, torch.bfloat16)
    pipeline, network = load_pipeline(family, folder).to(torch.bfloat16), family.load_transformer()
    heard: dict[str, set[float]] = {"pipeline": set(), "here": set()}
    for where, module in (("pipeline", pipeline.transformer), ("here", network)):
        module.register_forward_pre_hook(
            lambda _, __, inputs, where=where: heard[where].update(inputs["timestep"].tolist()), with_kwargs=True
        )
    draw(tiny, family, pipeline, guidance)
    roll_out(family, network, guidance)
    assert heard["here"] == heard["pipeline"]
    assert len(heard["here"]) == STEPS


@torch.no_grad()
def check_prompts_do_not_mix(family: ModelFamily) -> None:
    """A prompt's velocity is the same among longer and shorter ones as alone, and no other prompt's."""
    network, x, sigma = family.load_transformer(), noise(family).draw(slice(None)), torch.tensor([0.9, 0.5, 0.2, 0.7])
    pictures = references(family, len(PROMPTS))
    together = family.velocity(network, x, sigma, family.encode(PROMPTS, pictures))
    for row, prompt in enumerate(PROMPTS):
        own = slice(row, row + 1)
        close(together[own], family.velocity(network, x[own], sigma[own], family.encode([prompt], pictures[own])))
    other = family.velocity(network, x, sigma, family.encode(PROMPTS[::-1], pictures))
    assert not torch.allclose(other[0], together[0], atol=1e-3)


@torch.no_grad()
def check_attention_masks(family: ModelFamily) -> None:
    """Under guidance too, prompts of one length need no mask, with which attention leaves its fastest kernels."""
    masked: list[bool] = []
    plain = functional.scaled_dot_product_attention

    def noting(*inputs: Any, **options: Any) -> Tensor:
        masked.append(options.get("attn_mask") is not None)
        return plain(*inputs, **options)

    network, x = family.load_transformer(), noise(family).draw(slice(None))
    uncond, equal, unequal = (
        family.encode(prompts) for prompts in ([family.negative_prompt], PROMPTS[1:2] * len(x), PROMPTS)
    )
    with patch.object(functional, "scaled_dot_product_attention", noting):
        for cond, expected in ((equal, False), (unequal, True)):
            masked.clear()
            family.guided_velocity(network, x, torch.full((len(x),), 0.5), cond, uncond, 4.0)
            assert any(masked) == expected
            assert masked  # attention was heard


def check_exports(tiny: ModuleType, family: ModelFamily, other: Path, folder: Path, guidance: float) -> None:
    """Both forms of an exported student draw in diffusers what they draw here."""
    full = family.load_transformer(other)
    family.save_full(full.state_dict(), folder / "full")
    close(draw(tiny, family, load_pipeline(family, folder / "full"), guidance), roll_out(family, full, guidance))

    adapted = family.load_transformer()
    plain = roll_out(family, adapted, guidance)
    lora.new_adapter(adapted, "student", LoraConfig(r=2, lora_alpha=4, target_modules=list(family.lora_targets)))
    for parameter in lora.adapter_parameters(adapted, "student").values():
        nn.init.normal_(parameter, std=0.3)
    state = lora.strip_adapter_name(adapted.state_dict())
    unused = [target for target in family.lora_targets if not any(f"{target}.lora_A" in key for key in state)]
    assert not unused
    family.save_lora(state, lora.adapter_config(adapted, "student"), folder / "lora")
    pipeline = load_pipeline(family, family.path)
    load_lora(family, pipeline, folder / "lora")
    final = roll_out(family, adapted, guidance)
    close(draw(tiny, family, pipeline, guidance), final)
    assert not torch.allclose(final, plain, atol=1e-2)


@torch.no_grad()
def finite_at_both_ends(build: Callable[[torch.dtype], ModelFamily]) -> bool:
    """Whether no velocity at sigma 1 or 0 is NaN or infinite, in fp32 and bf16."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        family = build(dtype)
        network, (cond, _), x = family.load_transformer(), encode(family, PROMPTS), noise(family).draw(slice(None))
        for sigma in torch.tensor([1.0, 0.0]):
            network_there = family.at_stage(network, family.stages(sigma[None])[0])
            found.append(family.velocity(network_there, x, sigma.expand(len(x)), cond))
        assert all(velocity.shape == x.shape and velocity.dtype == dtype for velocity in found[-2:])
    return all(bool(velocity.isfinite().all()) for velocity in found)


def check_refusals(name: str, folder: Path, empty: Path) -> None:
    """Sizes that are no whole patches, and a folder of another layout."""
    family = build(name, folder)
    odd = family.size_unit + family.size_unit // 2
    refused: list[tuple[Path, dict[str, int], str]] = [
        (folder, {"height": odd}, f"multiples of {family.size_unit}"),
        (folder, {"width": odd}, f"multiples of {family.size_unit}"),
        (empty, {}, f"{family.pipeline_class} layout"),
    ]
    for place, size, said in refused:
        try:
            build(name, place, torch.float32, **size)
        except UserError as error:
            message = str(error)
        else:
            message = "nothing"
        assert said in message


def change(file: Path, **entries: object) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
