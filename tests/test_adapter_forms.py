"""The strength of a LoRA in every form that it is written in, and every key of a file accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd_ds.checkpoint.export_student import STUDENT_ADAPTER
from opd_ds.config.sections import LoraSection, StudentSection
from opd_ds.errors import UserError
from opd_ds.models import lora
from opd_ds.models.adapter_config import scale
from opd_ds.models.sd3 import SD3
from opd_ds.training.networks import student_module
from tests.test_lora import answer
from tests.tiny import TARGETS, write_lora

State = dict[str, Tensor]
RANK, ALPHA = 4, 6.0
# By pipeline and form: how a trainer names a module, and its name in diffusers.
FORMS = [
    ("StableDiffusion3Pipeline", "transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
    ("StableDiffusion3Pipeline", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
    ("FluxPipeline", "transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
    ("FluxPipeline", "diffusion_model.double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0"),
    ("Flux2KleinPipeline", "transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
    ("Flux2KleinPipeline", "diffusion_model.double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0"),
    ("QwenImagePipeline", "transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
    ("QwenImagePipeline", "diffusion_model.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
    ("ZImagePipeline", "transformer.layers.0.attention.to_q", "layers.0.attention.to_q"),
    ("ZImagePipeline", "diffusion_model.layers.0.attention.to_q", "layers.0.attention.to_q"),
    ("WanPipeline", "transformer.blocks.0.attn1.to_q", "blocks.0.attn1.to_q"),
    ("WanPipeline", "diffusion_model.blocks.0.self_attn.q", "blocks.0.attn1.to_q"),
    ("WanPipeline", "diffusion_model.blocks.0.cross_attn.o", "blocks.0.attn2.to_out.0"),
]
KOHYA = [
    ("FluxPipeline", "lora_unet_double_blocks_0_img_attn_proj", "transformer_blocks.0.attn.to_out.0"),
    ("Flux2KleinPipeline", "lora_unet_double_blocks_0_img_attn_proj", "transformer_blocks.0.attn.to_out.0"),
    ("QwenImagePipeline", "lora_unet_transformer_blocks_0_attn_to_q", "transformer_blocks.0.attn.to_q"),
    ("ZImagePipeline", "lora_unet_layers_0_attention_to_q", "layers.0.attention.to_q"),
]
SPELLINGS = {
    "lora_A": ("lora_A", "lora_B"),
    "lora_down": ("lora_down", "lora_up"),
    "lora.down": ("lora.down", "lora.up"),
}


def write(file: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, file, metadata)
    return file


def factors(name: str, spelling: str, alpha: float | None = ALPHA) -> State:
    torch.manual_seed(3)
    down, up = SPELLINGS[spelling]
    state = {f"{name}.{down}.weight": torch.randn(RANK, 8), f"{name}.{up}.weight": torch.randn(8, RANK)}
    return state if alpha is None else state | {f"{name}.alpha": torch.tensor(alpha)}


def deltas(path: Path, pipeline_class: str | None) -> State:
    """What the LoRA adds to each module, as it is read here."""
    config, state = lora.read_adapter(path, pipeline_class)
    modules = {key.rsplit(".lora_", 1)[0] for key in state}
    return {m: scale(config, m) * state[f"{m}.lora_B.weight"] @ state[f"{m}.lora_A.weight"] for m in modules}


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize(
    ("pipeline_class", "theirs", "ours", "spelling"),
    [(*form, spelling) for form in FORMS for spelling in ("lora_A", "lora_down")]
    + [(*form, "lora_down") for form in KOHYA]
    + [("StableDiffusion3Pipeline", *FORMS[0][1:], "lora.down")],
)
def test_an_alpha_counts_in_every_form_of_every_family(
    tmp_path: Path, pipeline_class: str, theirs: str, ours: str, spelling: str, alpha: float | None
) -> None:
    state = factors(theirs, spelling, alpha)
    found = deltas(write(tmp_path / "x.safetensors", state), pipeline_class)
    down, up = (value for value in state.values() if value.ndim == 2)
    torch.testing.assert_close(found, {ours: (1.0 if alpha is None else alpha / RANK) * up @ down})


def test_an_alpha_counts_in_musubi_tuners_form(tmp_path: Path) -> None:
    """Its converter wants every module of a block."""
    names = [f"{kind}_{part}" for kind in ("self_attn", "cross_attn") for part in "qkvo"] + ["ffn_0", "ffn_2"]
    state = {k: v for name in names for k, v in factors(f"lora_unet_blocks_0_{name}", "lora_down").items()}
    found = deltas(write(tmp_path / "x.safetensors", state), "WanPipeline")
    first = factors("x", "lora_down")
    assert len(found) == 10
    for delta in found.values():
        torch.testing.assert_close(delta, ALPHA / RANK * first["x.lora_up.weight"] @ first["x.lora_down.weight"])


@pytest.mark.parametrize("ending", ["diff", "diff_b", "diff_m", "set_weight"])
@pytest.mark.parametrize(("pipeline_class", "theirs", "ours"), [*FORMS, *KOHYA])
def test_differences_beside_a_lora_are_refused_unless_they_are_zero(
    tmp_path: Path, pipeline_class: str, theirs: str, ours: str, ending: str
) -> None:
    state = factors(theirs, "lora_down")
    norm = theirs.replace("to_q", "norm").replace("attn_proj", "attn_norm")
    for name in (theirs, norm):
        file = write(tmp_path / "x.safetensors", state | {f"{name}.{ending}": torch.tensor([0.0, 0.1])})
        with pytest.raises(UserError, match=rf"x\.safetensors: holds weight differences \('{name}.{ending}'\)"):
            lora.read_adapter(file, pipeline_class)
    zero = write(tmp_path / "zero.safetensors", state | {f"{norm}.{ending}": torch.zeros(2)})
    if ending == "set_weight":  # it replaces: zeros are not nothing
        with pytest.raises(UserError, match="holds weight differences"):
            lora.read_adapter(zero, pipeline_class)
    else:
        assert deltas(zero, pipeline_class).keys() == {ours}


@pytest.mark.parametrize(("pipeline_class", "theirs", "ours"), [*FORMS, *KOHYA])
def test_no_converter_leaves_a_key_out(tmp_path: Path, pipeline_class: str, theirs: str, ours: str) -> None:
    """A LoRA of a module that no network has: it is refused, or comes out under its name and is refused by the network.
    diffusers' own converters drop some without an error."""
    unknown = "lora_unet_nothing_0_known" if theirs.startswith("lora_unet_") else "diffusion_model.nothing.0.known"
    state = factors(theirs, "lora_down") | factors(unknown, "lora_down")
    found, said = {}, ""
    try:
        found = deltas(write(tmp_path / "x.safetensors", state), pipeline_class)
    except UserError as error:
        said = str(error)
    assert any("nothing" in module for module in found) or re.search(r"not LoRA weights|cannot convert", said)


# ---- one file at a time that is no plain LoRA ----


def peft(**fields: Any) -> Callable[[Path, Path], Path]:
    """A PEFT folder with these fields in its configuration."""

    def make(world: Path, out: Path) -> Path:
        folder = write_lora(world / "base", out / "lora")
        file = folder / lora.PEFT_CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return folder

    return make


def keys(**changes: Tensor | None) -> Callable[[Path, Path], Path]:
    """A diffusers file with further keys, '__' for '.'."""

    def make(world: Path, out: Path) -> Path:
        state = factors("transformer.transformer_blocks.0.attn.to_q", "lora_A", None)
        more = {f"transformer.transformer_blocks.0.{key.replace('__', '.')}": value for key, value in changes.items()}
        merged = {key: value for key, value in (state | more).items() if value is not None}
        return write(out / lora.DIFFUSERS_WEIGHTS, merged)

    return make


def config_alone(text: str) -> Callable[[Path, Path], Path]:
    def make(world: Path, out: Path) -> Path:
        folder = write_lora(world / "base", out / "lora")
        (folder / lora.PEFT_CONFIG).write_text(text)
        return folder

    return make


def weights_alone(world: Path, out: Path) -> Path:
    folder = write_lora(world / "base", out / "lora")
    (folder / lora.PEFT_CONFIG).unlink()
    return folder / lora.PEFT_WEIGHTS


def weights_renamed(world: Path, out: Path) -> Path:
    return weights_alone(world, out).rename(out / "style.safetensors")


ONE = torch.ones(2)
NOT_SUPPORTED = [
    ("use_dora", True),
    ("lora_bias", True),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("modules_to_save", ["proj_out"]),
    ("fan_in_fan_out", True),
    ("layer_replication", [[0, 1], [0, 2]]),
    ("trainable_token_indices", [1]),
    ("target_parameters", ["proj_out.weight"]),
    ("alora_invocation_tokens", [1]),
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("arrow_config", {"top_k": 1}),
    ("kasa_config", {"beta": 0.1}),
    ("monteclora_config", {"num_samples": 2}),
    ("megatron_config", {"a": 1}),
    ("ensure_weight_tying", True),
    ("a_field_of_a_later_peft", 0.5),
]


@pytest.mark.parametrize(("field", "value"), NOT_SUPPORTED)
def test_a_field_that_changes_the_arithmetic_is_refused_by_name(
    tiny_world: Path, tmp_path: Path, field: str, value: Any
) -> None:
    with pytest.raises(UserError, match=rf"^adapter_config\.json: {field} = .* changes what the adapter computes"):
        lora.read_adapter(peft(**{field: value})(tiny_world, tmp_path))
    # diffusers records the same fields in the file.
    packed = {
        f"transformer.{key}": v for key, v in {"r": 4, "lora_alpha": 8, "target_modules": ["x"], field: value}.items()
    }
    state = factors("transformer.x", "lora_A", None)
    file = write(tmp_path / "x.safetensors", state, {"lora_adapter_metadata": json.dumps(packed)})
    with pytest.raises(UserError, match=rf"^x\.safetensors: lora_adapter_metadata: {field} = "):
        lora.read_adapter(file)


def test_fields_without_effect_and_defaults_are_accepted(tiny_world: Path, tmp_path: Path) -> None:
    """What PEFT itself writes, every field at its default; and what only decided about training."""
    defaults = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS).to_dict()
    defaults |= {"target_modules": TARGETS, "peft_type": "LORA", "lora_dropout": 0.3, "init_lora_weights": "gaussian"}
    defaults |= {"task_type": "FEATURE_EXTRACTION", "a_field_of_a_later_peft": None}
    folder = peft(**defaults)(tiny_world, tmp_path)
    torch.testing.assert_close(deltas(folder, None), deltas(tiny_world / "adapter", None))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica"])
def test_an_initialisation_that_changed_the_base_is_refused(tiny_world: Path, tmp_path: Path, init: str) -> None:
    with pytest.raises(UserError, match=rf"init_lora_weights = '{init}' also changes the base"):
        lora.read_adapter(peft(init_lora_weights=init)(tiny_world, tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (weights_alone, r"^adapter_model\.safetensors: .*without the adapter_config\.json that says their alpha"),
        (weights_renamed, r"^style\.safetensors: .*without the adapter_config\.json that says their alpha"),
        (peft(r=0), r"r = 0; allowed is a positive number"),
        (peft(r="4"), r"r = '4'; allowed is a positive number"),
        (peft(lora_alpha=0), r"lora_alpha = 0; allowed is a positive number"),
        (peft(lora_alpha=-8), r"lora_alpha = -8; allowed is a positive number"),
        (peft(alpha_pattern={"to_q": -1}), r"alpha_pattern of 'to_q' = -1; allowed is a positive number"),
        (peft(rank_pattern=[4]), r"rank_pattern = \[4\]; allowed is a number for each"),
        (peft(target_modules=None), "target_modules is missing"),
        (peft(layers_pattern="blocks"), "PEFT does not accept it"),
        (peft(peft_type="IA3"), "peft_type = 'IA3'; allowed is 'LORA'"),
        (config_alone("[]"), "adapter_config.json is not valid JSON"),
        (config_alone('{"r": 4,'), "adapter_config.json is not valid JSON"),
        (config_alone("version https://git-lfs.github.com/spec/v1\n"), "adapter_config.json is not valid JSON"),
        (keys(attn__to_q__alpha=torch.tensor(0.0)), r"to_q\.alpha' is 0\.0; allowed is one positive number"),
        (keys(attn__to_q__alpha=torch.tensor(-4.0)), r"to_q\.alpha' is -4\.0; allowed"),
        (keys(attn__to_q__alpha=torch.tensor(torch.nan)), r"to_q\.alpha' is nan; allowed"),
        (keys(attn__to_q__alpha=torch.tensor([1.0, 2.0])), r"to_q\.alpha' is \[1\.0, 2\.0\]; allowed"),
        (keys(attn__to_k__alpha=torch.tensor(4.0)), r"to_k\.alpha' is the alpha of a module without both factors"),
        (keys(attn__to_q__lora_B__weight=None), "half a LoRA"),
        (
            keys(attn__to_q__lora_A__two__weight=torch.ones(4, 8), attn__to_q__lora_B__two__weight=torch.ones(8, 4)),
            r"holds several LoRAs of one module \('.*to_q\.lora_A\.two\.weight' and '.*to_q\.lora_A\.weight'\)",
        ),
        (keys(attn__to_q__lora_B__weight=torch.full((8, 4), torch.nan)), "32 values are NaN or infinite, the first in"),
        (keys(attn__to_q__lora_A__weight=torch.zeros(4, 8, dtype=torch.int8)), "is stored as I8; allowed"),
        (keys(attn__to_q__lora_A__weight=torch.zeros(0, 8), attn__to_q__lora_B__weight=torch.zeros(8, 0)), "r = 0;"),
        (keys(attn__to_q__lora_A__bias=ONE), r"holds biases of the LoRA \(lora_bias\)"),
        (keys(attn__to_q__lora_B__bias=ONE), r"holds biases of the LoRA \(lora_bias\)"),
        (keys(attn__to_q__dora_scale=ONE), "holds DoRA weights"),
        (keys(attn__to_q__lora_magnitude_vector=ONE), "holds DoRA weights"),
        (keys(attn__to_q__lokr_w1=ONE), "holds LoKr weights"),
        (keys(attn__to_q__hada_w1_a=ONE), "holds LoHa weights"),
        (keys(attn__to_q__ia3_l=ONE), "holds IA3 weights"),
        (keys(attn__to_q__oft_R__weight=ONE), "holds OFT weights"),
        (keys(attn__to_q__boft_R=ONE), "holds BOFT weights"),
        (keys(attn__to_q__vera_lambda_b=ONE), "holds VeRA weights"),
        (keys(attn__to_q__lora_mid__weight=ONE), r"holds a third factor \(LoCon\)"),
        (keys(attn__to_q__lora_embedding_A=ONE), "holds a LoRA of embeddings"),
        (keys(attn__to_q__modules_to_save__weight=ONE), r"holds whole modules \(modules_to_save\)"),
        (keys(attn__to_q__bias=ONE), r"1 of 3 keys are not LoRA weights .*, the first: '.*to_q\.bias'; biases"),
    ],
)
def test_what_is_no_plain_lora_is_refused_in_one_line(
    tiny_world: Path, tmp_path: Path, make: Callable[[Path, Path], Path], message: str
) -> None:
    path = make(tiny_world, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        lora.read_adapter(path, "StableDiffusion3Pipeline")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 360  # three lines of 120 columns


def test_a_config_beside_a_file_is_its_own_only_if_peft_wrote_both(tiny_world: Path, tmp_path: Path) -> None:
    """A config of r 4 and alpha 8 lies beside diffusers' file, whose alpha is its rank."""
    file = keys()(tiny_world, write_lora(tiny_world / "base", tmp_path / "lora"))
    state = load_file(file)
    down, up = state.values()
    torch.testing.assert_close(deltas(file, None), {"transformer_blocks.0.attn.to_q": up @ down})
    twice = deltas(tmp_path / "lora" / lora.PEFT_WEIGHTS, None)
    torch.testing.assert_close(twice, deltas(tiny_world / "adapter", None))


def test_a_text_encoders_part_may_hold_nothing_at_all(tmp_path: Path) -> None:
    state = factors("transformer.transformer_blocks.0.attn.to_q", "lora_A", None)
    second = {"text_encoder.layers.0.q.lora_B.weight": torch.zeros(2, 2)}
    first = {"text_encoder.layers.0.q.lora_A.weight": torch.ones(2, 2)}
    assert len(deltas(write(tmp_path / "x.safetensors", state | first | second), None)) == 1
    for more in ({"text_encoder.layers.0.q.diff_b": ONE}, {"te1.layers.0.q.dora_scale": ONE}):
        with pytest.raises(UserError, match="adapts a text encoder too"):
            lora.read_adapter(write(tmp_path / "x.safetensors", state | first | second | more))
    with pytest.raises(UserError, match="a LoRA of text encoders alone"):
        lora.read_adapter(write(tmp_path / "x.safetensors", first | second))


# ---- what we write ----


def keys_alone(world: Path, file: Path) -> SD3Transformer2DModel:
    """The base with what a reader adds that knows names and no configuration, as ComfyUI."""
    network = SD3Transformer2DModel.from_pretrained(world / "base", subfolder="transformer")
    state = load_file(file)
    with torch.no_grad():
        for key, down in state.items():
            if ".lora_A." in key:
                name = key.split(".lora_A.")[0]
                alpha = state.get(f"{name}.alpha", torch.tensor(float(len(down))))
                module = network.get_submodule(name.removeprefix("transformer.").removeprefix("base_model.model."))
                module.weight += alpha / len(down) * state[key.replace("lora_A", "lora_B")] @ down
    return network


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 6, "use_rslora": True},
        {
            "lora_alpha": 12,
            "rank_pattern": {"attn.to_q": 2},
            "alpha_pattern": {"attn.to_v": 1, r"^transformer_blocks\.0": 5},
        },
    ],
)
def test_an_export_is_as_strong_wherever_it_is_read(tiny_world: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    family = SD3(tiny_world / "base", dtype=torch.float32, device=torch.device("cpu"))
    network = family.load_transformer()
    torch.manual_seed(0)
    lora.new_adapter(network, "student", LoraConfig(r=4, target_modules=TARGETS, **settings))
    for parameter in lora.adapter_parameters(network, "student").values():
        torch.nn.init.normal_(parameter, std=0.3)
    wanted = answer(network)
    stored = lora.to_store(network.state_dict(), lora.adapter_config(network, "student"))
    family.save_lora(*stored, tmp_path / "diffusers")
    lora.save_peft(*stored, tmp_path / "peft", "base")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_world / "base")
    pipeline.load_lora_weights(tmp_path / "diffusers")
    readers = {
        "diffusers": pipeline.transformer,
        "PEFT": PeftModel.from_pretrained(family.load_transformer(), tmp_path / "peft"),
        "keys alone, diffusers' file": keys_alone(tiny_world, tmp_path / "diffusers" / lora.DIFFUSERS_WEIGHTS),
        "keys alone, PEFT's file": keys_alone(tiny_world, tmp_path / "peft" / lora.PEFT_WEIGHTS),
    }
    for name, reader in readers.items():
        torch.testing.assert_close(
            answer(reader), wanted, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert not torch.allclose(wanted, answer(family.load_transformer()), atol=1e-2)
    # A student that starts from it computes the same, whatever alpha it is trained with.
    for form in ("diffusers", "peft"):
        student = StudentSection(kind="lora", start=form, lora=LoraSection(rank=4, alpha=5.0))
        started = student_module(student, 0, family, tmp_path / form)
        torch.testing.assert_close(answer(started), wanted, rtol=1e-4, atol=1e-5)
        own = lora.adapter_config(started, STUDENT_ADAPTER)
        assert {
            scale(own, key.rsplit(".lora_", 1)[0]) for key in lora.adapter_parameters(started, STUDENT_ADAPTER)
        } == {1.25}
