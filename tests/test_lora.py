"""Adapters in: every key accounted for, PEFT's and diffusers' forms, several on one base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel

from opd_ds.errors import UserError
from opd_ds.models import lora
from opd_ds.models.sd3 import SD3
from tests.tiny import TARGETS

CPU = torch.device("cpu")


def base(world: Path) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(world / "base", subfolder="transformer")


def answer(network: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return network(
            hidden_states=torch.randn(2, 4, 8, 8, generator=generator),
            timestep=torch.tensor([500.0, 20.0]),
            encoder_hidden_states=torch.randn(2, 6, 32, generator=generator),
            pooled_projections=torch.randn(2, 32, generator=generator),
            return_dict=False,
        )[0]


def test_a_peft_folder_gives_what_peft_gives(tiny_world: Path) -> None:
    network = base(tiny_world)
    before = answer(network)
    lora.load_adapter(network, "a", tiny_world / "adapter")
    lora.activate(network, "a")
    expected = answer(PeftModel.from_pretrained(base(tiny_world), tiny_world / "adapter"))
    assert torch.equal(answer(network), expected)
    assert not torch.allclose(expected, before)
    assert not any(p.requires_grad for p in lora.adapter_parameters(network, "a").values())


def test_two_adapters_share_a_base(tiny_world: Path) -> None:
    network = base(tiny_world)
    for name in ("adapter", "adapter2"):
        lora.load_adapter(network, name, tiny_world / name)
    for name in ("adapter2", "adapter", "adapter2"):
        lora.activate(network, name)
        alone = base(tiny_world)
        lora.load_adapter(alone, "alone", tiny_world / name)
        assert torch.equal(answer(network), answer(alone))


def test_the_diffusers_form_reads_back_with_its_alpha(tiny_world: Path, tmp_path: Path) -> None:
    """What `save_lora` writes is read by diffusers' pipeline and by our reader, to the same answer."""
    network = base(tiny_world)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, init_lora_weights="gaussian")
    lora.new_adapter(network, "student", config)
    for parameter in lora.adapter_parameters(network, "student").values():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = answer(network)
    family = SD3(tiny_world / "base", dtype=torch.float32, device=CPU)
    state = lora.strip_adapter_name(network.state_dict())
    family.save_lora(state, lora.adapter_config(network, "student"), tmp_path / "export")

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_world / "base")
    pipeline.load_lora_weights(tmp_path / "export")
    torch.testing.assert_close(answer(pipeline.transformer), expected)
    again = base(tiny_world)
    lora.load_adapter(again, "x", tmp_path / "export")
    torch.testing.assert_close(answer(again), expected)


def test_targets_that_match_nothing(tiny_world: Path) -> None:
    with pytest.raises(UserError, match=r"\['nothing'\] match no module"):
        lora.new_adapter(base(tiny_world), "x", LoraConfig(target_modules=["nothing"]))


def test_another_peft_is_refused(tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose adapted layers are of another class, or keep their own weights under another name."""
    network = base(tiny_world)
    lora.load_adapter(network, "a", tiny_world / "adapter")
    with monkeypatch.context() as renamed:
        renamed.setattr("peft.tuners.tuners_utils.BaseTunerLayer", type("Other", (), {}))
        with pytest.raises(UserError, match=r"^peft [\d.]+: adapted layers are no BaseTunerLayer.*install peft>="):
            lora.activate(network, "a")
    with monkeypatch.context() as renamed:
        renamed.delattr("peft.tuners.tuners_utils.BaseTunerLayer")
        with pytest.raises(UserError, match=r"peft\.tuners\.tuners_utils\.BaseTunerLayer is gone"):
            lora.activate(network, "a")
    monkeypatch.setattr("opd_ds.models.privates.BASE_LAYER", ".inner.")
    with pytest.raises(UserError, match=r"does not keep its own weights under '\.inner\.'"):
        lora.merged_weights(network)


def test_another_diffusers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from opd_ds.models import privates

    assert privates.linear_shift()(256, 256, 4096, 0.5, 1.15) == 0.5
    monkeypatch.delattr("diffusers.pipelines.flux.pipeline_flux.calculate_shift")
    with pytest.raises(UserError, match=r"^diffusers [\d.]+: .*calculate_shift is gone.*install diffusers>=0\.42"):
        privates.linear_shift()
