"""`opd-ds merge`: against PEFT; what is written, as others read it. The arithmetic: tests/test_merge_arithmetic.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from opd_ds.cli.merge import merge
from opd_ds.config.paths import package_root
from opd_ds.errors import UserError
from opd_ds.merge.files import parse_sources
from opd_ds.models import lora
from opd_ds.utils.hashing import weights_sha256
from tests.test_adapters import original_layout
from tests.test_merge_arithmetic import few, ties_by_hand
from tests.tiny import TARGETS, write_lora

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(merge)


def run(*arguments: str | Path) -> str:
    """What the command prints."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None:
        raise result.exception
    return result.output


def transformer(folder: Path) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer").requires_grad_(False)


def write_adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """A random LoRA in PEFT's folder form, with any fields of LoraConfig."""
    torch.manual_seed(seed)
    network = transformer(base)
    lora.new_adapter(network, "x", LoraConfig(**config))
    state = {k: torch.randn_like(v) * 0.2 for k, v in lora.adapter_parameters(network, "x").items()}
    folder.mkdir(parents=True)
    save_file({f"base_model.model.{key}": value for key, value in state.items()}, folder / lora.PEFT_WEIGHTS)
    (folder / lora.PEFT_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": base.name}))
    return folder


def dense(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The deltas of a LoRA as PEFT itself works them out, in float64, by parameter name."""
    network = transformer(base)
    lora.load_adapter(network, "x", adapter)
    modules = {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    return {f"{name}.weight": module.get_delta_weight("x").double() for name, module in modules.items()}


def added(first: dict[str, Tensor], *weighted: tuple[float, dict[str, Tensor]]) -> dict[str, Tensor]:
    """first + sum(weight * delta), missing ones zero, in float64."""
    result = {key: value.double() for key, value in first.items()}
    for weight, deltas in weighted:
        for key, delta in deltas.items():
            result[key] = result.get(key, torch.zeros_like(delta)) + weight * delta
    return result


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].double(), value.double(), rtol=0, atol=atol, msg=key)


def answer(network: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    config = network.config
    with torch.no_grad():
        return network(
            hidden_states=torch.randn(2, config.in_channels, 8, 8, generator=generator),
            timestep=torch.tensor([500.0, 20.0]),
            encoder_hidden_states=torch.randn(2, 6, config.joint_attention_dim, generator=generator),
            pooled_projections=torch.randn(2, config.pooled_projection_dim, generator=generator),
            return_dict=False,
        )[0]


@pytest.fixture(scope="module")
def base(tiny_world: Path) -> Path:
    return tiny_world / "base"


@pytest.fixture(scope="module")
def loras(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three that differ in all that decides a delta: modules (a convolution among them), ranks, alphas, rsLoRA."""
    root = tmp_path_factory.mktemp("loras")
    patterns = {"rank_pattern": {"to_q": 5, "1.attn.to_k": 3}, "alpha_pattern": {"to_v": 9}}
    mixed = [*TARGETS, "ff.net.0.proj", "pos_embed.proj"]
    return [
        write_adapter(base, root / "plain", 1, r=4, lora_alpha=8, target_modules=TARGETS),
        write_adapter(base, root / "patterns", 2, r=2, lora_alpha=3, target_modules=mixed, **patterns),
        write_adapter(base, root / "rs", 3, r=3, lora_alpha=4, target_modules=TARGETS[:2], use_rslora=True),
    ]


# ---- LoRAs ----


def test_linear_is_the_weighted_sum(base: Path, loras: list[Path], tmp_path: Path) -> None:
    output = run(tmp_path / "out", f"{loras[0]}:0.5", f"{loras[1]}:0.8", f"{loras[2]}:-0.3")
    wanted = added({}, *zip((0.5, 0.8, -0.3), (dense(base, path) for path in loras), strict=True))
    assert_same(dense(base, tmp_path / "out"), wanted)
    assert "pos_embed.proj.weight" in wanted
    assert wanted["pos_embed.proj.weight"].ndim == 4
    assert "relative error" not in output
    config, state = lora.read_adapter(tmp_path / "out")
    assert config.base_model_name_or_path == "base"
    assert len(state["transformer_blocks.0.attn.to_q.lora_A.weight"]) == 4 + 5 + 3


@pytest.mark.parametrize("options", [[], ["--method", "ties"], ["--method", "dare_linear", "--rank", "3"]])
def test_diffusers_and_we_read_what_is_written(
    base: Path, loras: list[Path], tmp_path: Path, options: list[str]
) -> None:
    run(tmp_path / "out", *loras, *options)
    merged, ours = transformer(base), transformer(base)
    state = added(merged.state_dict(), (1.0, dense(base, tmp_path / "out")))
    merged.load_state_dict({key: value.float() for key, value in state.items()})
    lora.load_adapter(ours, "teacher", tmp_path / "out")
    lora.activate(ours, "teacher")
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path / "out")
    wanted = answer(merged)
    torch.testing.assert_close(answer(ours), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer(pipeline.transformer), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answer(transformer(base)), wanted, atol=1e-2)


def test_default_weights_are_an_average_and_a_model_with_itself_is_itself(
    base: Path, loras: list[Path], tmp_path: Path
) -> None:
    output = run(tmp_path / "three", *loras)
    assert output.count("0.333 x ") == 3
    assert_same(dense(base, tmp_path / "three"), added({}, *((1 / 3, dense(base, path)) for path in loras)))
    run(tmp_path / "twice", f"{loras[1]}:0.5", f"{loras[1]}:0.5")
    assert_same(dense(base, tmp_path / "twice"), dense(base, loras[1]))
    # A merged LoRA, in diffusers' form, by folder or by file, is a source as well.
    run(tmp_path / "again", tmp_path / "twice", tmp_path / "three" / lora.DIFFUSERS_WEIGHTS)
    halves = (dense(base, tmp_path / name) for name in ("twice", "three"))
    assert_same(dense(base, tmp_path / "again"), added({}, *((0.5, deltas) for deltas in halves)))


def test_ties_works_module_by_module_on_full_deltas(base: Path, loras: list[Path], tmp_path: Path) -> None:
    """With enough rank nothing is cut, and the file holds what the rule says; a module that one lacks is zero there."""
    output = run(tmp_path / "out", *loras, "--method", "ties", "--density", "0.4", "--rank", "1000")
    assert float(output.split("(Frobenius): ")[1].split()[0]) == 0
    deltas = [dense(base, path) for path in loras]
    wanted = {}
    for key in {key: None for one in deltas for key in one}:
        zero = torch.zeros_like(next(one[key] for one in deltas if key in one))
        wanted[key] = ties_by_hand([one.get(key, zero) for one in deltas], [1 / 3] * 3, 0.4, "total")
    assert_same(dense(base, tmp_path / "out"), wanted, atol=1e-5)


def test_a_rank_is_the_best_of_that_rank_and_the_error_is_said(base: Path, loras: list[Path], tmp_path: Path) -> None:
    """Eckart-Young, with the singular values from numpy."""
    output = run(tmp_path / "out", *loras[:2], "--rank", "3")
    whole = added({}, *((0.5, dense(base, path)) for path in loras[:2]))
    found = dense(base, tmp_path / "out")
    lost = total = 0.0
    for key, delta in whole.items():
        values = np.linalg.svd(delta.flatten(1).numpy(), compute_uv=False)
        assert float((found[key] - delta).norm()) == pytest.approx(float(np.sqrt((values[3:] ** 2).sum())), abs=1e-5)
        lost, total = lost + float((values[3:] ** 2).sum()), total + float((values**2).sum())
    said = float(output.split("(Frobenius): ")[1].split()[0])
    assert said == pytest.approx((lost / total) ** 0.5, rel=1e-2)
    assert 0.1 < said < 0.9
    assert lora.read_adapter(tmp_path / "out")[0].r == 3


def test_by_default_the_rank_is_that_of_the_sources_together(base: Path, loras: list[Path], tmp_path: Path) -> None:
    run(tmp_path / "out", *loras, "--method", "dare_ties")
    state = lora.read_adapter(tmp_path / "out")[1]
    assert len(state["transformer_blocks.0.attn.to_q.lora_A.weight"]) == 4 + 5 + 3
    assert len(state["transformer_blocks.0.ff.net.0.proj.lora_A.weight"]) == 2


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_a_seed_names_what_dare_drops(loras: list[Path], tmp_path: Path, method: str) -> None:
    before = torch.get_rng_state()
    hashes = []
    for number, seed in enumerate((7, 7, 8)):
        run(tmp_path / str(number), *loras, "--method", method, "--seed", str(seed))
        hashes.append(weights_sha256(tmp_path / str(number) / lora.DIFFUSERS_WEIGHTS))
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(torch.get_rng_state(), before)


# ---- full checkpoints ----


def test_a_full_checkpoint_and_a_lora(tiny_world: Path, base: Path, loras: list[Path], tmp_path: Path) -> None:
    other = tiny_world / "other"
    run(tmp_path / "out", f"{other}:0.7", f"{loras[1]}:-0.4", "--base", base)
    start, end = transformer(base).state_dict(), transformer(other).state_dict()
    full = {key: end[key].double() - value.double() for key, value in start.items()}
    wanted = added(start, (0.7, full), (-0.4, dense(base, loras[1])))
    assert_same(transformer(tmp_path / "out").state_dict(), wanted)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(answer(pipeline.transformer), answer(transformer(tmp_path / "out")))


def test_ties_of_full_checkpoints(tiny_world: Path, base: Path, loras: list[Path], tmp_path: Path) -> None:
    """Biases and norms too; in shards on disk as well."""
    sharded = tmp_path / "sharded"
    transformer(tiny_world / "other").save_pretrained(sharded / "transformer", max_shard_size="50KB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    run(tmp_path / "out", sharded, loras[0], "--base", base, "--method", "ties", "--majority-sign", "frequency")
    start, end = transformer(base).state_dict(), transformer(tiny_world / "other").state_dict()
    deltas, wanted = dense(base, loras[0]), {}
    for key, value in start.items():
        full = (end[key] - value).double()
        pair = [full, deltas.get(key, torch.zeros_like(full))]
        wanted[key] = value + ties_by_hand(pair, [0.5, 0.5], 0.5, "frequency")
    assert_same(transformer(tmp_path / "out").state_dict(), wanted, atol=1e-5)


def test_a_full_checkpoint_in_one_file(tiny_world: Path, base: Path, loras: list[Path], tmp_path: Path) -> None:
    """In its authors' layout too: the merge is that of the folder."""
    file = "transformer/diffusion_pytorch_model.safetensors"
    save_file(original_layout(load_file(tiny_world / "other" / file)), tmp_path / "other.safetensors")
    run(tmp_path / "single", tmp_path / "other.safetensors", loras[1], "--base", base)
    run(tmp_path / "folder", tiny_world / "other", loras[1], "--base", base)
    single, folder = (load_file(tmp_path / name / file) for name in ("single", "folder"))
    assert single.keys() == folder.keys()
    assert all(torch.equal(single[key], value) for key, value in folder.items())
    save_file({"proj_out.weight": torch.zeros(16, 32)}, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=r"source '.*short.safetensors': neither a LoRA nor a whole SD3Tr"):
        run(tmp_path / "refused", tmp_path / "short.safetensors", loras[1], "--base", base)


def test_the_miniatures_teachers(tmp_path: Path) -> None:
    """Half-precision files, full checkpoints without text encoders: average of all three."""
    teachers = "package:miniature/assets/teachers"
    names = [f"{teachers}/{name}" for name in ("text", "look", "composition")]
    base = package_root() / "miniature" / "assets" / "miniature_base"
    run(tmp_path / "out", *names, "--base", "package:miniature/assets/miniature_base")
    start = transformer(base).state_dict()
    folder = package_root() / "miniature" / "assets" / "teachers"
    ends = [transformer(folder / name).state_dict() for name in ("text", "look", "composition")]
    parts = [{key: value.double() - start[key].double() for key, value in end.items()} for end in ends]
    wanted = added(start, *((1 / 3, part) for part in parts))
    assert_same(transformer(tmp_path / "out").state_dict(), wanted)
    assert StableDiffusion3Pipeline.from_pretrained(tmp_path / "out").vae is not None


# ---- where it came from ----


def test_the_card_says_what_went_in(tiny_world: Path, base: Path, loras: list[Path], tmp_path: Path) -> None:
    options = ["--method", "dare_ties", "--density", "0.6", "--seed", "5"]
    output = run(tmp_path / "lora", f"{loras[0]}:2", loras[1], *options)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "# base, merged from 2 teachers" in card
    assert f"| teacher, weight 2 | `{loras[0]}` | `{weights_sha256(loras[0])}` |" in card
    assert f"| teacher, weight 0.5 | `{loras[1]}` | `{weights_sha256(loras[1])}` |" in card
    for line in ("method: dare_ties", "density: 0.6", "majority_sign: total", "seed: 5", "relative_error: 0."):
        assert line in card
    assert f"wrote {tmp_path / 'lora'}" in output
    run(tmp_path / "full", tiny_world / "other", loras[0], "--base", base)
    card = (tmp_path / "full" / "README.md").read_text()
    assert f"| base | `{base}` | `{weights_sha256(base)}` |" in card
    assert "without training: full weights" in card
    assert "seed" not in card
    with safe_open(tmp_path / "lora" / lora.DIFFUSERS_WEIGHTS, framework="pt") as file:
        assert "lora_adapter_metadata" in file.metadata()


# ---- what is refused ----


@given(name=st.text(st.characters(blacklist_categories=["Cs"]), min_size=1), weight=st.floats(-9, 9).filter(bool))
@few
def test_only_a_number_after_the_last_colon_is_a_weight(name: str, weight: float) -> None:
    sources = parse_sources([f"{name}:{weight!r}", "package:miniature/assets/teachers/text"])
    assert (sources[0].name, sources[0].weight) == (name, weight)
    assert (sources[1].name, sources[1].weight) == ("package:miniature/assets/teachers/text", 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A"], r"sources = \['.*plain'\]: merging needs at least two"),
        (["A:0", "A"], r"source '.*:0': expected NAME\[:WEIGHT\], the weight finite and not 0"),
        (["A:nan", "A"], "expected NAME"),
        ([":0.5", "A"], "expected NAME"),
        (["A", "A", "--method", "tise"], r"--method = 'tise': unknown; allowed: linear, .*Did you mean 'ties'\?"),
        (["A", "A", "--density", "0.5"], "--density = 0.5: --method linear drops nothing; leave it out"),
        (
            ["A", "A", "--method", "ties", "--density", "0"],
            "--density = 0: allowed is the share .* above 0 and at most 1",
        ),
        (["A", "A", "--method", "ties", "--density", "1.5"], "--density = 1.5: allowed"),
        (["A", "A", "--majority-sign", "total"], "--majority-sign = 'total': --method linear elects no signs"),
        (["A", "A", "--method", "ties", "--majority-sign", "most"], "'most': unknown; allowed: total, frequency"),
        (["A", "A", "--rank", "0"], "--rank = 0: allowed: 1 and more"),
        (["A", "A", "--base", "BASE"], "--base = '.*': LoRAs are merged to a LoRA, which needs no base; leave it out"),
        (["A", "OTHER"], "--base: needed, as '.*other' is a full checkpoint; give the diffusers folder it came from"),
        (["A", "OTHER", "--base", "BASE", "--rank", "3"], "--rank = 3: '.*other' is a full checkpoint"),
        (["A", "OTHER", "--base", "A"], "--base = '.*plain': a LoRA; expected a diffusers folder"),
        (["A", "OTHER", "--base", "BASE", "--family", "sd4"], "'sd4': unknown; allowed: sd3"),
        (["A", "./nowhere"], "source = './nowhere': no such file or folder"),
        (["A", "WORLD"], "neither a LoRA nor a checkpoint by itself, but it holds adapter/"),
    ],
)
def test_what_does_not_go_together(
    tiny_world: Path, loras: list[Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"A": loras[0], "BASE": tiny_world / "base", "OTHER": tiny_world / "other", "WORLD": tiny_world}
    for word, place in places.items():
        arguments = [str(place) + a[len(word) :] if a.split(":")[0] == word else a for a in arguments]
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path / "out", *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_occupied_folder_is_refused(loras: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        run(tmp_path, *loras)


def test_loras_of_different_bases(tiny_world: Path, base: Path, loras: list[Path], tmp_path: Path) -> None:
    stranger = write_lora(base, tmp_path / "stranger", base_name="org/another")
    cousin = write_lora(base, tmp_path / "cousin", base_name="org/base/")
    refusal = "trained on base 'org/another', the rest belongs to '.*base'; .* give --trust-base"
    with pytest.raises(UserError, match=refusal):
        run(tmp_path / "out", loras[0], stranger)
    with pytest.raises(UserError, match=refusal):
        run(tmp_path / "out", tiny_world / "other", stranger, "--base", base)
    run(tmp_path / "cousins", loras[0], cousin)
    run(tmp_path / "trusted", loras[0], stranger, "--trust-base")
    # Without weights of its own a base that is not recorded cannot be another.
    config = json.loads((stranger / lora.PEFT_CONFIG).read_text())
    (stranger / lora.PEFT_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    run(tmp_path / "unnamed", loras[0], stranger)


def test_another_world_or_missing_weights(tiny_world: Path, base: Path, tmp_path: Path) -> None:
    other = transformer(tiny_world / "other")
    other.register_to_config(patch_size=4)
    other.save_pretrained(tmp_path / "patches" / "transformer")
    with pytest.raises(UserError, match="has patch_size = 4, the student has 2"):
        run(tmp_path / "out", tmp_path / "patches", tiny_world / "adapter", "--base", base)
    file = "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(tiny_world / "other" / file)
    del state["proj_out.bias"]
    shutil.copytree(tiny_world / "other", tmp_path / "partial")
    save_file(state, tmp_path / "partial" / file)
    with pytest.raises(UserError, match=r"source '.*partial': .*1 missing, the first: 'proj_out.bias'"):
        run(tmp_path / "out", tmp_path / "partial", tiny_world / "adapter", "--base", base)
    shallow = SD3Transformer2DModel.from_config(dict(other.config) | {"patch_size": 2, "num_layers": 1})
    shallow.save_pretrained(tmp_path / "shallow" / "transformer")
    with pytest.raises(UserError, match=r"source '.*shallow': .*(lacks \d+ weights of the base|has shape)"):
        run(tmp_path / "out", tmp_path / "shallow", tiny_world / "adapter", "--base", base)
    assert not (tmp_path / "out").exists()


def drop_b(state: dict[str, Tensor]) -> None:
    state.pop(next(key for key in state if "lora_B" in key))


def widen(state: dict[str, Tensor]) -> None:
    state.update({key: torch.cat([value] * 2, 1) for key, value in state.items() if "to_k.lora_A" in key})


def add_encoder(state: dict[str, Tensor]) -> None:
    state.update({f"text_encoder.q.lora_{part}.weight": torch.ones(4, 4) for part in "AB"})


def thin(state: dict[str, Tensor]) -> None:
    state.update({key: value[:3] for key, value in state.items() if "lora_A" in key})


def rename(state: dict[str, Tensor]) -> None:
    for key in list(state):
        state[key.replace("to_k", "to_nowhere")] = state.pop(key)


@pytest.mark.parametrize(
    ("damage", "full", "message"),
    [
        (drop_b, False, r"source '.*damaged': .*half a LoRA, the first: 'transformer_blocks.0.attn.\w+' has no lora_B"),
        (thin, False, r"has \(3, 32\) and \(32, 4\)|has \(3, 16\) and \(16, 4\)"),
        (add_encoder, False, "adapts a text encoder too .*'text_encoder.q.lora_A.weight'"),
        (widen, False, r"source '.*damaged': 'transformer_blocks.0.attn.to_k.weight' has shape .* in another source"),
        (
            widen,
            True,
            r"source '.*damaged': 'transformer_blocks.0.attn.to_k.weight' has shape .*, in the base it is \(",
        ),
        (rename, True, r"'transformer_blocks.0.attn.to_nowhere.weight' has shape .*, in the base it is absent"),
    ],
)
def test_weights_that_do_not_fit(
    tiny_world: Path, tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], full: bool, message: str
) -> None:
    folder = write_lora(tiny_world / "base", tmp_path / "damaged")
    state = load_file(folder / lora.PEFT_WEIGHTS)
    damage(state)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / lora.PEFT_WEIGHTS)
    rest = [tiny_world / "other", "--base", tiny_world / "base"] if full else []
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", tiny_world / "adapter2", folder, *rest)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "grey.safetensors").touch()
    with pytest.raises(UserError, match=r"grey\.safetensors:x': the weight 'x' is no number"):
        parse_sources([f"{tmp_path}/grey.safetensors:x", "other"])
