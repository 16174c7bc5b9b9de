"""Checkpoints as others write them: foreign LoRAs as diffusers' pipelines read them, transformers in one file, and one
clear line for everything that does not fit, before a network loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.paths import resolve_path
from opd_ds.config.sections import StudentSection
from opd_ds.config.teachers import TeacherSection
from opd_ds.errors import UserError
from opd_ds.models import lora
from opd_ds.models.inspection.fitting import check_weights
from opd_ds.models.sd3 import SD3
from opd_ds.runs.model_specs import Requests, contestants
from opd_ds.testing.tiny.sd3 import SIZES
from opd_ds.training.networks import student_module
from opd_ds.training.teachers import TeacherPool, TeacherSpec
from tests.test_lora import answer
from tests.tiny import run_settings, write_lora

CPU = torch.device("cpu")
State = dict[str, Tensor]


def family(world: Path, dtype: torch.dtype = torch.float32) -> SD3:
    return SD3(world / "base", dtype=dtype, device=CPU, max_text_length=10)


def save(state: State, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    return file


def plain(world: Path) -> State:
    """The tiny world's LoRA (rank 4, alpha 8) with keys relative to the transformer."""
    state = load_file(world / "adapter" / lora.PEFT_WEIGHTS)
    return {key.removeprefix("base_model.model."): value for key, value in state.items()}


# ---- LoRAs as others write them ----


@pytest.fixture(scope="module")
def flux() -> FluxPipeline:
    """A pipeline around a transformer of some ten thousand parameters, and nothing else."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_single_layers": 1, "attention_head_dim": 12, "num_attention_heads": 2}
    transformer = FluxTransformer2DModel(
        in_channels=4, joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 4), **sizes
    )
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return FluxPipeline(transformer=transformer, **dict.fromkeys(parts))


def flux_answer(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return network(
            hidden_states=torch.randn(1, 6, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 3, 16, generator=generator),
            pooled_projections=torch.randn(1, 8, generator=generator),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(3, 3),
            return_dict=False,
        )[0]


def kohya() -> State:
    state = {}
    for block in range(2):
        for number, (layer, size, out) in enumerate(
            [("img_attn_qkv", 24, 72), ("img_attn_proj", 24, 24), ("txt_mlp_0", 24, 96)], start=2
        ):
            name = f"lora_unet_double_blocks_{block}_{layer}"
            state[f"{name}.lora_down.weight"] = torch.randn(number, size)
            state[f"{name}.lora_up.weight"] = torch.randn(out, number)
            state[f"{name}.alpha"] = torch.tensor(1.5 * number)
    # A LoRA for a text encoder that was never trained does nothing, and may stand in the file.
    name = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    state |= {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.zeros(8, 2)}
    return state | {f"{name}.alpha": torch.tensor(1.0)}


def with_alphas() -> State:
    """diffusers' names, a rank and an alpha for each module; `proj_out` is the end of another module's name as well."""
    state = {}
    for rank, (module, size, out) in enumerate(
        [
            ("transformer_blocks.0.attn.to_q", 24, 24),
            ("transformer_blocks.1.ff.net.0.proj", 24, 96),
            ("single_transformer_blocks.0.attn.to_v", 24, 24),
            ("proj_out", 24, 4),
        ],
        start=1,
    ):
        state[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, size)
        state[f"transformer.{module}.lora_B.weight"] = torch.randn(out, rank)
        state[f"transformer.{module}.alpha"] = torch.tensor(7.0 - rank)
    return state


@pytest.mark.parametrize("make", [kohya, with_alphas])
def test_a_foreign_lora_gives_what_the_pipeline_gives(
    flux: FluxPipeline, tmp_path: Path, make: Callable[[], State]
) -> None:
    torch.manual_seed(4)
    file = save(make(), tmp_path / "foreign.safetensors")
    before = flux_answer(flux.transformer)
    ours = FluxTransformer2DModel.from_config(flux.transformer.config)
    ours.load_state_dict(flux.transformer.state_dict())
    lora.load_adapter(ours, "x", file, "FluxPipeline")
    given = {key: value for key, value in load_file(file).items() if not key.startswith("lora_te")}
    flux.load_lora_weights(given, adapter_name="theirs")
    try:
        wanted = flux_answer(flux.transformer)
    finally:
        flux.unload_lora_weights()
    lora.activate(ours, "x")
    torch.testing.assert_close(flux_answer(ours), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, before, atol=1e-2)


def test_alphas_and_old_names_without_a_config(tiny_world: Path, tmp_path: Path) -> None:
    base, state = family(tiny_world), plain(tiny_world)
    modules = {key.rsplit(".lora_", 1)[0] for key in state}
    with_alpha = state | {f"{module}.alpha": torch.tensor(8.0) for module in modules}
    old = {
        f"transformer.{key}".replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for key, v in state.items()
    }
    answers = {}
    for name, file in {
        "folder": tiny_world / "adapter",
        "alphas": save({f"transformer.{key}": value for key, value in with_alpha.items()}, tmp_path / "a.safetensors"),
        "old": save(old, tmp_path / lora.DIFFUSERS_WEIGHTS),
    }.items():
        network = base.load_transformer()
        lora.load_adapter(network, "x", file, base.pipeline_class)
        lora.activate(network, "x")
        answers[name] = answer(network)
    torch.testing.assert_close(answers["alphas"], answers["folder"])
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_world / "base")
    pipeline.load_lora_weights(tmp_path / lora.DIFFUSERS_WEIGHTS)
    torch.testing.assert_close(answers["old"], answer(pipeline.transformer))
    assert not torch.allclose(answers["old"], answers["folder"], atol=1e-2)  # without alphas the scale is 1


def test_a_foreign_lora_goes_out_as_any_other(tiny_world: Path, tmp_path: Path) -> None:
    """One that knows its modules by their full names only, as a student started from it would export it."""
    base, state = family(tiny_world), plain(tiny_world)
    state |= {"proj_out.lora_A.weight": torch.randn(2, 32), "proj_out.lora_B.weight": torch.randn(16, 2)}
    file = save({f"transformer.{key}": value for key, value in state.items()}, tmp_path / "x.safetensors")
    network = base.load_transformer()
    lora.load_adapter(network, "x", file, base.pipeline_class)
    lora.activate(network, "x")
    wanted, config = answer(network), lora.adapter_config(network, "x")
    kept = lora.strip_adapter_name(network.state_dict())
    base.save_lora(kept, config, tmp_path / "diffusers")
    lora.save_peft(kept, config, tmp_path / "peft", "base")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_world / "base")
    pipeline.load_lora_weights(tmp_path / "diffusers")
    torch.testing.assert_close(answer(pipeline.transformer), wanted)
    torch.testing.assert_close(answer(PeftModel.from_pretrained(base.load_transformer(), tmp_path / "peft")), wanted)
    for form in ("diffusers", "peft"):
        again = base.load_transformer()
        lora.load_adapter(again, "x", tmp_path / form, base.pipeline_class)
        lora.activate(again, "x")
        torch.testing.assert_close(answer(again), wanted)
    assert lora.named_base(tmp_path / "peft") == "base"


# ---- a transformer in one file ----

_TOP = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_FUSED = {"x_block": ("to_q", "to_k", "to_v"), "context_block": ("add_q_proj", "add_k_proj", "add_v_proj")}


def original_layout(state: State) -> State:
    """The names and the order of rows that Stability's own SD3 files have: the inverse of diffusers' conversion."""
    state, layout = dict(state), {}
    for block in range(SIZES.layers):
        for side, parts in _FUSED.items():
            for kind in ("weight", "bias"):
                rows = [state.pop(f"transformer_blocks.{block}.attn.{part}.{kind}") for part in parts]
                layout[f"joint_blocks.{block}.{side}.attn.qkv.{kind}"] = torch.cat(rows)
    last = f"transformer_blocks.{SIZES.layers - 1}.norm1_context.linear"
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        if name in (last, "norm_out.linear"):  # shift and scale are the other way round
            value = torch.cat(list(reversed(value.chunk(2))))
        if name.startswith("transformer_blocks"):
            _, block_index, rest = name.split(".", 2)
            layout[f"joint_blocks.{block_index}.{_BLOCK[rest]}.{kind}"] = value
        else:
            layout[_TOP[key] if key in _TOP else f"{_TOP[name]}.{kind}"] = value
    return {f"model.diffusion_model.{key}": value for key, value in layout.items()}


@pytest.fixture(scope="module")
def single_files(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """other/, the full teacher, as single files."""
    folder = tmp_path_factory.mktemp("single")
    state = load_file(tiny_world / "other" / "transformer" / "diffusion_pytorch_model.safetensors")
    layout = original_layout(state)
    extra = {"first_stage_model.decoder.conv_in.weight": torch.zeros(3, 3)}
    return {
        "original": save(layout, folder / "original.safetensors"),
        "whole model": save(layout | extra, folder / "whole.safetensors"),
        "diffusers": save(state, folder / "diffusers.safetensors"),
        "half": save({key: value.half() for key, value in state.items()}, folder / "half.safetensors"),
    }


@pytest.mark.parametrize("which", ["original", "whole model", "diffusers", "half"])
def test_a_single_file_is_the_checkpoint_it_was_made_of(
    tiny_world: Path, single_files: dict[str, Path], which: str
) -> None:
    base, file = family(tiny_world), single_files[which]
    assert not lora.is_adapter(file)
    check_weights(base, "tasks.one.teacher.path", str(file), file, "base", trust_base=False)
    settings = TeacherSection(path=str(file), placement="resident")
    pool = TeacherPool(base, {"one": TeacherSpec(settings, file)}, CPU)
    start = student_module(StudentSection(kind="full", start=str(file)), 0, base, file)
    wanted = answer(SD3Transformer2DModel.from_pretrained(tiny_world / "other", subfolder="transformer"))
    with pool.active("one") as network:
        assert torch.allclose(answer(network), wanted, atol=1e-2 if which == "half" else 0)
    assert torch.equal(answer(start), answer(network))
    assert next(start.parameters()).dtype == torch.float32
    assert all(parameter.requires_grad for name, parameter in start.named_parameters())


def test_single_files_and_loras_are_evaluated(tiny_world: Path, single_files: dict[str, Path], tmp_path: Path) -> None:
    base, config = family(tiny_world), DistilConfig.model_validate(run_settings(tiny_world, tmp_path))
    lora_file = tiny_world / "adapter" / lora.PEFT_WEIGHTS
    asked = Requests(defaults=False, models=[f"single={single_files['original']}", f"lora={lora_file}"])
    single, adapted = contestants(config, base, asked, ["one"], CPU)
    with single.open() as network:
        wanted = answer(SD3Transformer2DModel.from_pretrained(tiny_world / "other", subfolder="transformer"))
        assert torch.equal(answer(network), wanted)
    with adapted.open() as network:
        plain_base = SD3Transformer2DModel.from_pretrained(tiny_world / "base", subfolder="transformer")
        assert torch.equal(answer(network), answer(PeftModel.from_pretrained(plain_base, tiny_world / "adapter")))
    broken = text_file(tiny_world, tmp_path)
    with pytest.raises(UserError, match=r"^--model x=.*notes.safetensors: .* is damaged or no safetensors file"):
        contestants(config, base, Requests(defaults=False, models=[f"x={broken}"]), ["one"], CPU)


def test_one_file_of_a_hub_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(repository: str, **options: object) -> str:
        asked.append((repository, options["allow_patterns"]))
        (tmp_path / "loras").mkdir()
        (tmp_path / "loras" / "sd3_x.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_path("org/name/loras/sd3_x.safetensors", "k") == tmp_path / "loras" / "sd3_x.safetensors"
    assert asked == [("org/name", ["loras/sd3_x.safetensors", "loras/adapter_config.json"])]


# ---- what does not fit ----


def changed(change: Callable[[State], object]) -> Callable[[Path, Path], Path]:
    """The tiny world's LoRA folder with other weights."""

    def make(world: Path, out: Path) -> Path:
        folder = write_lora(world / "base", out / "damaged")
        state = load_file(folder / lora.PEFT_WEIGHTS)
        change(state)
        save(state, folder / lora.PEFT_WEIGHTS)
        return folder

    return make


def configured(**fields: object) -> Callable[[Path, Path], Path]:
    def make(world: Path, out: Path) -> Path:
        folder = write_lora(world / "base", out / "damaged")
        file = folder / lora.PEFT_CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return folder

    return make


def lora_file(make_state: Callable[[State], State]) -> Callable[[Path, Path], Path]:
    """A LoRA file of keys `transformer.<module>.lora_A.weight`, no config beside."""

    def make(world: Path, out: Path) -> Path:
        state = {f"transformer.{key}": value for key, value in plain(world).items()}
        return save(make_state(state), out / "file.safetensors")

    return make


def network_file(change: Callable[[State], State]) -> Callable[[Path, Path], Path]:
    def make(world: Path, out: Path) -> Path:
        state = load_file(world / "other" / "transformer" / "diffusion_pytorch_model.safetensors")
        return save(change(state), out / "network.safetensors")

    return make


def cut(make: Callable[[Path, Path], Path], name: str = "") -> Callable[[Path, Path], Path]:
    def shorter(world: Path, out: Path) -> Path:
        path = make(world, out)
        file = path / name if name else path
        file.write_bytes(file.read_bytes()[:-100])
        return path

    return shorter


def text_file(world: Path, out: Path) -> Path:
    (out / "notes.safetensors").write_text("certainly not weights, whatever it is called")
    return out / "notes.safetensors"


def copied_other(world: Path, out: Path) -> Path:
    network = SD3Transformer2DModel.from_pretrained(world / "other", subfolder="transformer")
    network.save_pretrained(out / "copy" / "transformer")
    return out / "copy"


def drop(part: str) -> Callable[[State], object]:
    return lambda state: state.pop(min(key for key in state if part in key))


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {key.replace(old, new): value for key, value in state.items()}


def grown(state: State) -> None:
    state.update({key: torch.cat([value, value]) for key, value in state.items() if "to_k.lora_A" in key})


def wider(state: State) -> None:
    state.update({key: torch.cat([value, value], 1) for key, value in state.items() if "to_k.lora_A" in key})


def flux_keys(_: State) -> State:
    return kohya()


TEXT_ENCODER = {f"text_encoder.layers.0.q.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
FIRST = "transformer_blocks.0.attn.to_k"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        # another base, another network
        (
            configured(base_model_name_or_path="org/else"),
            "on base 'org/else', the student's is 'base'.*trust_base=true",
        ),
        (configured(peft_type="LOHA"), "peft_type = 'LOHA'; allowed is 'LORA'"),
        (configured(r=8), rf"'{FIRST}' has \(4, 32\) and \(32, 4\) for lora_A and lora_B, its config says rank 8"),
        (configured(target_modules=["attn.to_q"]), rf"12 unexpected, the first: '{FIRST}.lora_A.weight'"),
        (configured(target_modules=["nothing"]), r"targets \['nothing'\] match no module of SD3Transformer2DModel"),
        (changed(wider), rf"'{FIRST}.lora_A.weight' has shape \(4, 64\), this base needs \(4, 32\)"),
        (changed(grown), rf"'{FIRST}' has \(8, 32\) and \(32, 4\)"),
        (lora_file(flux_keys), "not LoRA weights .*StableDiffusion3Pipeline, the first: 'lora_unet_double_blocks_0"),
        (lora_file(renamed("transformer_blocks", "blocks")), r"'blocks.0.attn.to_k', .*match no module"),
        (
            lora_file(renamed("to_q", "to_x")),
            r"4 unexpected, the first: 'transformer_blocks.0.attn.to_x.lora_A.weight'",
        ),
        # half of one, more than one
        (changed(drop("lora_B")), rf"1 modules have half a LoRA, the first: '{FIRST}' has no lora_B"),
        (changed(drop("lora_A")), rf"1 modules have half a LoRA, the first: '{FIRST}' has no lora_A"),
        (changed(lambda s: [drop(f"{FIRST}.lora")(s), drop(f"{FIRST}.lora")(s)]), rf"2 missing, .*'{FIRST}.lora_A"),
        (
            changed(lambda s: s.update({f"{FIRST}.bias": torch.zeros(4)})),
            rf"1 of 17 keys .*, the first: '{FIRST}.bias'",
        ),
        (changed(lambda s: s.update({f"{FIRST}.dora_scale": torch.zeros(4)})), "holds DoRA weights .*dora_scale"),
        (lora_file(renamed("lora_A", "lokr_w1")), "holds LoKr weights"),
        (lora_file(lambda s: s | TEXT_ENCODER), "text encoder too .2 keys, the first: 'text_encoder.layers.0.q.lora_A"),
        # no whole safetensors file
        (text_file, "notes.safetensors is damaged or no safetensors file"),
        (cut(changed(lambda s: None), lora.PEFT_WEIGHTS), "adapter_model.safetensors is damaged .*cut off"),
        (cut(network_file(lambda s: s)), "network.safetensors is damaged .*cut off"),
        (cut(copied_other, "transformer/diffusion_pytorch_model.safetensors"), "is damaged .*cut off"),
        # whole networks
        (network_file(lambda s: {k: v for k, v in s.items() if k != "proj_out.bias"}), "1 missing, .*'proj_out.bias'"),
        (network_file(lambda s: s | {"extra.bias": torch.zeros(2)}), "1 unexpected, the first: 'extra.bias'"),
        (
            network_file(lambda s: original_layout(s | {"proj_out.bias": torch.zeros(7)})),
            r"1 of another shape, the first: 'proj_out.bias' is \(7,\) instead of \(16,\)",
        ),
        (network_file(lambda s: {k: v.to(torch.float8_e4m3fn) for k, v in s.items()}), "stored as F8_E4M3; allowed"),
        (network_file(lambda s: {"unet.a": torch.zeros(2)}), "nor a whole SD3Transformer2DModel.*first key: 'unet.a'"),
        (lambda world, out: out, "neither a LoRA nor a checkpoint"),
    ],
)
def test_what_does_not_fit_is_said_before_a_network_loads(
    tiny_world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path, Path], Path],
    message: str,
) -> None:
    path = make(tiny_world, tmp_path)
    base = family(tiny_world)
    monkeypatch.setattr(SD3, "load_transformer", lambda *_: pytest.fail("a network was loaded"))
    with pytest.raises(UserError, match=message) as caught:
        check_weights(base, "tasks.one.teacher.path", str(path), path, "base", trust_base=False)
    assert str(caught.value).startswith(f"tasks.one.teacher.path = {str(path)!r}: ")
    assert "\n" not in str(caught.value)


def test_a_flux_lora_that_diffusers_cannot_convert(tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_77_img_attn_proj"
    state = kohya() | {f"{name}.lora_down.weight": torch.zeros(1, 1), f"{name}.lora_up.weight": torch.zeros(1, 1)}
    with pytest.raises(UserError, match=r"cannot convert it for FluxPipeline \(ValueError: Incompatible keys"):
        lora.read_adapter(save(state, tmp_path / "x.safetensors"), "FluxPipeline")


@pytest.mark.parametrize(
    ("theirs", "same"),
    [("org/base", True), ("org/base/", True), ("package:base", True), ("/a/b/base", True), ("org/base2", False)],
)
def test_names_of_one_base(theirs: str, same: bool) -> None:
    assert lora.same_base(theirs, "org/base") is same
