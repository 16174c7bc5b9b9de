"""What people name as weights: right, or one line before anything loads, from every command that takes weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.cluster.world import World
from opd_ds.config.loading import parse_config
from opd_ds.doctor.weights import look_at_files
from opd_ds.errors import UserError
from opd_ds.merge.files import Source, find_teacher
from opd_ds.models import lora
from opd_ds.models.inspection import check_base, inspect
from opd_ds.models.inspection.fitting import check_weights
from opd_ds.models.sd3 import SD3
from opd_ds.runs.files import find_files
from opd_ds.runs.model_specs import Requests, contestants
from tests.test_adapters import original_layout
from tests.test_lora import answer
from tests.tiny import run_settings, write_lora

WEIGHTS = "diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4\n"
Change = Callable[[Path], object]


def resaved(folder: Path, **options: object) -> None:
    network = SD3Transformer2DModel.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    network.save_pretrained(folder, **options)


def sharded(folder: Path) -> None:
    resaved(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def without_a_shard(folder: Path) -> None:
    sharded(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()


def without_the_index(folder: Path) -> None:
    sharded(folder)
    next(folder.glob("*.index.json")).unlink()


def index_of(change: Callable[[dict[str, str]], object]) -> Change:
    def make(folder: Path) -> None:
        sharded(folder)
        index = next(folder.glob("*.index.json"))
        content = json.loads(index.read_text())
        change(content["weight_map"])
        index.write_text(json.dumps(content))

    return make


def doubled_tensor(folder: Path) -> None:
    sharded(folder)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    state = load_file(first)
    save_file(load_file(second) | {min(state): state[min(state)]}, second)


def with_config(**fields: object) -> Change:
    def make(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return make


def weights(name: str, content: bytes | str) -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut_off(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])


def longer(folder: Path) -> None:
    """safetensors refuses bytes after the last tensor."""
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes() + b"more")


def only(name: str) -> Change:
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def stored(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def make(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return make


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
# What can be wrong with the folder of a network, and what is said of it; %s is the folder.
NETWORK = {
    "bitsandbytes": (with_config(quantization_config=BNB), r"quantized by bitsandbytes \(load_in_4bit\); give the unq"),
    "no method": (with_config(quantization_config={"load_in_8bit": True}), r"quantized by bitsandbytes \(load_in_8bit"),
    "torchao": (with_config(quantization_config={"quant_method": "torchao"}), "quantized by torchao; give the unq"),
    "compressed": (with_config(compression_config={"format": "pack"}), "compression_config: .*quantized by pack"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no .*config\.json; copy or download it"),
    "config pointer": (weights("config.json", POINTER), r"config\.json is a git-lfs pointer, .*run `git lfs pull`"),
    "config cut": (weights("config.json", '{"a": 1'), r"config\.json is no valid JSON"),
    "config list": (weights("config.json", "[]"), r"config\.json is no JSON object"),
    "config empty": (weights("config.json", ""), r"config\.json is empty; copy or download it again"),
    "shard gone": (without_a_shard, r"lacks 1 of \d+ files that .*index\.json lists, the first: .*00002-of"),
    "no index": (without_the_index, rf"no .*{WEIGHTS}, but diffusion_pytorch_model-00001-of"),
    "index lists more": (index_of(lambda m: m.update(x=min(m.values()))), "lists 1 tensors that its files lack.*'x'"),
    "index outside": (index_of(lambda m: m.update({"x": "../x.safetensors"})), "names files outside its folder"),
    "in two shards": (doubled_tensor, "1 tensors are in several files"),
    "fp16 only": (only("diffusion_pytorch_model.fp16.safetensors"), rf"no .*{WEIGHTS}, only the variant 'fp16'"),
    "fp16 shards": (only("diffusion_pytorch_model.fp16-00001-of-00001.safetensors"), "only the variant 'fp16'"),
    "bin": (only("diffusion_pytorch_model.bin"), r"only a pickle \(diffusion_pytorch_model\.bin\)"),
    "bin shards": (only("diffusion_pytorch_model-00001-of-00001.bin"), "only a pickle .diffusion_pytorch_model-0"),
    "other name": (only("model.safetensors"), rf"no .*{WEIGHTS}, but model\.safetensors"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), rf"no .*{WEIGHTS}; copy or download it"),
    "pointer": (weights(WEIGHTS, POINTER), rf"{WEIGHTS} is a git-lfs pointer, not the file itself: run `git lfs pull`"),
    "empty": (weights(WEIGHTS, b""), rf"{WEIGHTS} is empty; copy or download it again"),
    "gguf": (weights(WEIGHTS, b"GGUF\x03\0\0\0" + b"\0" * 90), rf"{WEIGHTS} is a GGUF file, and GGUF is not read"),
    "pickle": (weights(WEIGHTS, b"PK\x03\x04" + b"\0" * 90), rf"{WEIGHTS} is a pickle of torch"),
    "web page": (weights(WEIGHTS, "\n<!DOCTYPE html><html>gated"), rf"{WEIGHTS} is a web page"),
    "noise": (weights(WEIGHTS, b"\xff" * 200), rf"{WEIGHTS} is damaged or no safetensors file \(no header\)"),
    "cut": (cut_off, rf"{WEIGHTS} is damaged or no safetensors file \(cut off\)"),
    "longer": (longer, rf"{WEIGHTS} is damaged or no safetensors file"),
    "no tensors": (stored(lambda s: s.clear()), rf"{WEIGHTS} holds no tensors"),
    "fp8": (stored(lambda s: s.update({k: v.to(torch.float8_e4m3fn) for k, v in s.items()})), "stored as F8_E4M3"),
    "int8": (stored(lambda s: s.update({"proj_out.weight": s["proj_out.weight"].to(torch.int8)})), "stored as I8"),
}  # fmt: skip
# What only the network's own class can see.
BY_NAMES = {
    "more": (stored(lambda s: s.update({"extra.weight": torch.ones(2)})), r"1 unexpected, the first: 'extra\.weight'"),
    "less": (stored(lambda s: s.pop("proj_out.bias")), r"1 missing, the first: 'proj_out\.bias'"),
    "other": (with_config(_class_name="FluxTransformer2DModel"), "has _class_name = 'FluxTransformer2DModel'"),
}


@pytest.mark.parametrize("which", NETWORK)
def test_a_network_that_cannot_be_loaded_is_one_line(tiny_world: Path, tmp_path: Path, which: str) -> None:
    """The same problem of a pipeline's transformer, of a transformer by itself, and of the base."""
    change, message = NETWORK[which]
    shutil.copytree(tiny_world / "other", tmp_path / "other")
    change(tmp_path / "other" / "transformer")
    for place in (tmp_path / "other", tmp_path / "other" / "transformer"):
        problem = str(inspect(place).problem)
        with pytest.raises(UserError, match=message):
            inspect(place).refuse_problem()
        assert "\n" not in problem
        assert len(problem.replace(str(tmp_path), "")) < 300
    with pytest.raises(UserError, match=message):
        check_base(tmp_path / "other", SD3)


@pytest.mark.parametrize("which", [*BY_NAMES, "pointer", "bitsandbytes", "shard gone"])
def test_every_command_refuses_it_before_a_network_loads(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    change, message = (NETWORK | BY_NAMES)[which]
    shutil.copytree(tiny_world / "other", tmp_path / "other")
    change(tmp_path / "other" / "transformer")
    place = tmp_path / "other"
    monkeypatch.setattr(SD3, "load_transformer", lambda *_: pytest.fail("a network was loaded"))
    base = SD3(tiny_world / "base", dtype=torch.float32, device=torch.device("cpu"), max_text_length=10)
    with pytest.raises(UserError, match=message):
        check_weights(base, "tasks.one.teacher.path", str(place), place, "base", trust_base=False)
    config = parse_config(run_settings(tiny_world, tmp_path, tasks__one__teacher__path=str(place)))
    with pytest.raises(UserError, match=message):
        contestants(config, base, Requests(defaults=False, models=[f"x={place}"]), ["one"], torch.device("cpu"))
    if which in NETWORK:
        with pytest.raises(UserError, match=message):
            find_files(config, World())
        with pytest.raises(UserError, match=message):
            find_teacher(Source(str(place), 1.0))
        (seen,) = [one for one in look_at_files(config) if one.what == "tasks.one.teacher.path"]
        assert seen.problem is not None
        with pytest.raises(UserError, match=message):
            find_files(parse_config(run_settings(tiny_world, tmp_path, model__path=str(place))), World())


def encoder(change: Change) -> Change:
    return lambda folder: change(folder / "text_encoder_3")


PARTS = {
    "quantized encoder": (encoder(with_config(quantization_config=BNB)), "text_encoder_3/config.json: .*bitsandb"),
    "encoder pointer": (encoder(weights("model.safetensors", POINTER)), "text_encoder_3/model.safetensors is a git"),
    "encoder bin": (
        encoder(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin")),
        r"no .*text_encoder_3/model\.safetensors, only a pickle \(pytorch_model\.bin\)",
    ),
    "encoder variant": (
        encoder(lambda folder: (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")),
        "only the variant 'fp16'",
    ),
    "no encoder": (lambda folder: shutil.rmtree(folder / "text_encoder_2"), r"no .*text_encoder_2/config\.json"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer is missing or empty"),
    "tokenizer pointer": (
        lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text(POINTER), r"tokenizer\.json is a git-lfs",
    ),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler is missing or empty"),
    "no VAE": (lambda folder: shutil.rmtree(folder / "vae"), r"no .*vae/config\.json"),
    "VAE cut": (
        lambda folder: cut_off(folder / "vae"), r"vae/diffusion_pytorch_model\.safetensors is damaged .*cut off",
    ),
    "no index": (lambda folder: (folder / "model_index.json").unlink(), r"no model_index\.json"),
    "index pointer": (
        lambda folder: (folder / "model_index.json").write_text(POINTER), r"model_index\.json is a git-lfs pointer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", PARTS)
def test_a_base_needs_all_its_parts_and_a_teacher_its_transformer(tiny_world: Path, tmp_path: Path, which: str) -> None:
    change, message = PARTS[which]
    folder = shutil.copytree(tiny_world / "base", tmp_path / "base")
    check_base(folder, SD3)
    change(folder)
    config = parse_config(run_settings(tiny_world, tmp_path, model__path=str(folder)))
    with pytest.raises(UserError, match=message) as caught:
        find_files(config, World())
    assert str(caught.value).startswith(f"model.path = {str(folder)!r}: ")
    (seen,) = [one for one in look_at_files(config) if one.what == "model.path"]
    assert seen.problem is not None
    assert seen.problem in str(caught.value)
    if "index" not in which or which == "no index":
        assert inspect(folder).problem is None


def test_what_is_not_loaded_is_not_looked_at(tiny_world: Path, tmp_path: Path) -> None:
    """A pickle and a half downloaded variant beside the weights, and folders behind links."""
    folder = shutil.copytree(tiny_world / "base", tmp_path / "base")
    (folder / "transformer").rename(tmp_path / "elsewhere")
    (folder / "transformer").symlink_to(tmp_path / "elsewhere")
    (folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_text(POINTER)
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    (folder / "sd3_medium.safetensors").write_text(POINTER)
    check_base(folder, SD3)
    found = inspect(folder)
    assert found.problem is None
    assert {"diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"} <= set(found.ignored)
    config = parse_config(run_settings(tiny_world, tmp_path, model__path=str(folder)))
    assert [one.problem for one in look_at_files(config)] == [None] * 5


def test_a_sharded_teacher_is_the_teacher(tiny_world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_world / "other", tmp_path / "other")
    sharded(folder / "transformer")
    base = SD3(tiny_world / "base", dtype=torch.float32, device=torch.device("cpu"), max_text_length=10)
    check_weights(base, "k", "v", folder, "base", trust_base=False)
    found = answer(base.load_transformer(folder))
    assert torch.equal(found, answer(base.load_transformer(tiny_world / "other")))
    assert "files" in inspect(folder).details["transformer"]


# ---- folders and files that are something else ----


def folder_of(*names: str) -> Callable[[Path, Path], Path]:
    def make(world: Path, out: Path) -> Path:
        for name in names:
            (out / "x" / name).parent.mkdir(parents=True, exist_ok=True)
            (out / "x" / name).write_bytes(b"\x80\x02")
        return out / "x"

    return make


def lora_in(where: str) -> Callable[[Path, Path], Path]:
    def make(world: Path, out: Path) -> Path:
        (out / "x").mkdir()
        write_lora(world / "base", out / "x" / where)
        return out / "x"

    return make


def both_loras(world: Path, out: Path) -> Path:
    folder = write_lora(world / "base", out / "x")
    shutil.copy(folder / lora.PEFT_WEIGHTS, folder / lora.DIFFUSERS_WEIGHTS)
    return folder


def lora_and_network(world: Path, out: Path) -> Path:
    folder = write_lora(world / "base", out / "x")
    shutil.copytree(world / "other" / "transformer", folder / "transformer")
    return folder


def gguf_file(world: Path, out: Path) -> Path:
    (out / "x.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 90)
    return out / "x.gguf"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gguf_file, r"x\.gguf is a GGUF file, and GGUF is not read"),
        (folder_of("model-Q4.gguf"), r"neither a LoRA nor a checkpoint; model-Q4\.gguf is not read, only safetensors"),
        (folder_of("x.safetensors"), r"by itself, but it holds x\.safetensors: name .*/x/x\.safetensors$"),
        (lora_in("lora"), r"by itself, but it holds lora/: name .*/x/lora$"),
        (both_loras, "holds two LoRAs, .*; name one of the files"),
        (lora_and_network, "holds a LoRA and a transformer/; name"),
        (folder_of("adapter_config.json"), "adapter_config.json without adapter_model.safetensors"),
        (folder_of("adapter_config.json", "adapter_model.bin"), r"adapter_model\.bin is a pickle of torch"),
        (folder_of("pytorch_lora_weights.bin"), r"pytorch_lora_weights\.bin is a pickle of torch"),
        (
            folder_of("state.json", "manifest.json", "shard-00000.safetensors"),
            "is a checkpoint of a run; name",
        ),
        (folder_of("checkpoints/latest", "metrics.jsonl"), "is the output folder of a run; .*opd-ds export"),
        (folder_of("checkpoints/latest", "export/x"), "is the output folder of a run; name .*/x/export"),
        (folder_of("notes.txt"), "neither a LoRA nor a checkpoint .no adapter_model"),
    ],
)
def test_something_else_is_named_with_what_to_do(
    tiny_world: Path, tmp_path: Path, make: Callable[[Path, Path], Path], message: str
) -> None:
    place = make(tiny_world, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        inspect(place).refuse_problem()
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        check_base(place, SD3)
    config = parse_config(run_settings(tiny_world, tmp_path / "out", tasks__one__teacher__path=str(place)))
    with pytest.raises(UserError, match=message):
        find_files(config, World())


def test_a_whole_model_is_its_transformer(tiny_world: Path, tmp_path: Path) -> None:
    """fp16, with text encoders in 8 bits and a VAE beside it: only the transformer's tensors matter."""
    state = load_file(tiny_world / "other" / "transformer" / WEIGHTS)
    whole = {key: value.half().contiguous() for key, value in original_layout(state).items()}
    whole["text_encoders.t5xxl.transformer.shared.weight"] = torch.ones(4, 4).to(torch.float8_e4m3fn)
    whole["first_stage_model.decoder.conv_in.weight"] = torch.ones(2, 2, dtype=torch.int8)
    save_file(whole, tmp_path / "sd3.safetensors")
    base = SD3(tiny_world / "base", dtype=torch.float32, device=torch.device("cpu"), max_text_length=10)
    found = inspect(tmp_path / "sd3.safetensors")
    assert (found.kind, found.problem, found.details["types"]) == ("single file", None, "F16")
    assert found.ignored == ("1 tensors first_stage_model.*", "1 tensors text_encoders.*")
    check_weights(base, "k", "v", tmp_path / "sd3.safetensors", "base", trust_base=False)
    wanted = answer(base.load_transformer(tiny_world / "other"))
    torch.testing.assert_close(answer(base.load_transformer(tmp_path / "sd3.safetensors")), wanted, rtol=0, atol=1e-2)
    # One of the transformer's own in 8 bits, or one that no conversion reads.
    name = "model.diffusion_model.context_embedder.weight"
    for change, message in (
        ({name: whole[name].to(torch.float8_e4m3fn)}, f"'{name}' is stored as F8_E4M3; allowed"),
        (
            {"model.diffusion_model.more.weight": torch.ones(2)},
            "1 of .* are not read .*_model.more.weight'",
        ),
    ):
        save_file(whole | change, tmp_path / "changed.safetensors")
        with pytest.raises(UserError, match=message):
            check_weights(base, "k", "v", tmp_path / "changed.safetensors", "base", trust_base=False)


# ---- the command ----


def said(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    return result.exit_code, result.output


def test_inspect_says_what_it_is(tiny_world: Path, tmp_path: Path) -> None:
    code, text = said(tiny_world / "base", "--family", "sd3")
    assert code == 0
    for line in (
        r"kind +diffusers pipeline",
        r"transformer +SD3Transformer2DModel, F32",
        "not used as teacher +vae/",
        "as base +yes",
        "as teacher +readable; keys and shapes are checked against a base: give --base",
    ):
        assert re.search(line, text)
    code, text = said(tiny_world / "adapter", "--json")
    found = json.loads(text)
    assert code == 0
    assert found["kind"] == "LoRA"
    assert found["details"] == {"form": "PEFT", "rank": "4", "alpha": "8", "base": "base", "types": "F32"}
    assert found["used"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert found["as_base"]["ok"] is False
    assert json.loads(said(tiny_world / "adapter", "--json", "--family", "sd3")[1])["details"]["modules"] == "8"
    folder = shutil.copytree(tiny_world / "base", tmp_path / "base")
    with_config(quantization_config=BNB)(folder / "text_encoder_3")
    code, text = said(folder)
    assert code == 0
    assert re.search("as base +no: ", text)
    (folder / "transformer" / WEIGHTS).write_text(POINTER)
    code, text = said(folder, "--json")
    assert code == 1
    assert "git lfs pull" in json.loads(text)["as_teacher"]["problem"]


def test_inspect_says_no_more_than_it_checked(tiny_world: Path, tmp_path: Path) -> None:
    """What a run refuses is not called good: other families, other shapes, a folder with a transformer only."""
    base = tiny_world / "base"
    code, text = said(tiny_world / "adapter", "--family", "sd3", "--base", base)
    assert (code, text.splitlines()[-1].split()) == (0, ["as", "teacher", "yes"])
    assert "as teacher readable; which keys can be converted depends on the family" in said(tiny_world / "adapter")[1]
    found = json.loads(said(tiny_world / "adapter", "--family", "flux", "--json")[1])["as_teacher"]
    assert (found["ok"], found["problem"]) == (None, None)
    assert "checked against a base" in found["unchecked"]
    folder = shutil.copytree(tiny_world / "adapter", tmp_path / "adapter")
    state = load_file(folder / lora.PEFT_WEIGHTS)
    key = min(name for name in state if "lora_A" in name)
    save_file(state | {key: state[key][:, :-1].contiguous()}, folder / lora.PEFT_WEIGHTS)
    code, text = said(folder, "--family", "sd3", "--base", base)
    assert code == 1
    assert re.search(r"as teacher +no: .* has shape .*, this base needs ", text)
    assert said(base, "--family", "sd3", "--base", base)[1].endswith("yes\n")
    assert re.search("as base +no: .*SD3Transformer2DModel, not FluxTr", said(base, "--family", "flux")[1])
    assert re.search("as base +readable; .*--family", said(base)[1])
    (shutil.copytree(base, tmp_path / "bare") / "model_index.json").unlink()
    for options in ([], ["--family", "sd3"]):
        assert re.search(r"as base +no: .*: no model_index\.json", said(tmp_path / "bare", *options)[1])
    for options, message in (
        (["--base", base], "give --family too"),
        (["--family", "sd3", "--base", tiny_world / "adapter"], "--base = .*: a LoRA; expected a diffusers folder"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, ["inspect", str(folder), *map(str, options)], catch_exceptions=False)
