"""Weights read where they are wanted: as diffusers reads them, to the bit, whole and in parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opd_ds.errors import UserError
from opd_ds.models import FAMILIES, ModelFamily, StoredTensor, WholeParameters, build_family, lora
from opd_ds.models.stored_weights import fill
from opd_ds.testing.family_checks import tiny_module
from tests import sharded_loading_ranks
from tests.ranks import launch

CPU = torch.device("cpu")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


# tests/test_family_wan_a14b.py loads a model of two networks.
@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "wan_a14b"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family's name and a tiny pipeline of it in float32."""
    name = request.param
    return name, tiny_module(name).write(tmp_path_factory.mktemp(name))


def build(name: str, path: Path, dtype: torch.dtype) -> ModelFamily:
    return build_family(name, path, dtype=dtype, device=CPU)


def tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a network computes with: parameters, buffers, and tables that are neither."""
    yield from network.named_parameters()
    yield from network.named_buffers()
    for prefix, module in network.named_modules():
        yield from ((f"{prefix}.{name}", value) for name, value in vars(module).items() if isinstance(value, Tensor))


def same(found: nn.Module, wanted: nn.Module, dtype: torch.dtype) -> None:
    """To the bit; diffusers keeps some parameters in float32."""
    theirs = dict(tensors(wanted))
    ours = dict(tensors(found))
    assert ours.keys() == theirs.keys()
    parameters = dict(found.named_parameters())
    for name, value in theirs.items():
        assert torch.equal(ours[name], value.to(dtype) if name in parameters else value), name
        assert ours[name].dtype == (dtype if name in parameters else value.dtype), name
    assert not found.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_is_what_diffusers_loads(stored: tuple[str, Path], dtype: torch.dtype) -> None:
    name, path = stored
    family = build(name, path, dtype)
    wanted = getattr(diffusers, family.transformer_class).from_pretrained(path, subfolder="transformer", dtype=dtype)
    same(family.load_transformer(), wanted, dtype)


def test_several_files_with_an_index_and_one_file_are_the_same(stored: tuple[str, Path], tmp_path: Path) -> None:
    name, path = stored
    family = build(name, path, torch.bfloat16)
    whole = family.load_transformer()
    family.load_transformer().save_pretrained(tmp_path / "parts" / "transformer", max_shard_size="40KB")  # type: ignore[operator]
    index = json.loads((tmp_path / "parts" / f"{WEIGHTS}.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    save_file(load_file(path / WEIGHTS), tmp_path / "one.safetensors")
    for source in (tmp_path / "parts", tmp_path / "one.safetensors"):
        same(family.load_transformer(source), whole, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("proj_out.weight"), r"1 missing, the first: 'proj_out.weight'"),
        (
            lambda state: state.update({"proj_out.weight": torch.zeros(3, 5)}),
            r"1 of another shape, the first: 'proj_out.weight' is \(3, 5\) instead of \(16, 32\)",
        ),
        (
            lambda state: state.update({"proj_out.weight": torch.zeros(16, 32, dtype=torch.int8)}),
            r"'proj_out.weight' is stored as I8; allowed are F64",
        ),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(
    tiny_world: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], says: str
) -> None:
    state = load_file(tiny_world / "base" / WEIGHTS)
    change(state)
    (tmp_path / "transformer").mkdir()
    save_file(state, tmp_path / WEIGHTS)
    shutil.copy(tiny_world / "base" / "transformer" / "config.json", tmp_path / "transformer")
    with pytest.raises(UserError, match=rf"^{tmp_path}: .*{says}"):
        build("sd3", tiny_world / "base", torch.float32).load_transformer(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"no .*transformer/diffusion_pytorch_model\.safetensors"):
        build("sd3", tiny_world / "base", torch.float32).load_transformer(tmp_path)


def test_a_tied_parameter_stays_tied_and_a_stored_tensor_is_not_written() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight

    values = torch.arange(4.0).view(2, 2)
    stored = StoredTensor.of(torch.empty(2, 2, device="meta"), lambda: values)
    with torch.device("meta"):
        network = Tied()
    fill(network, {"two.weight": stored}, WholeParameters(CPU), torch.float64, Path("a file"))
    assert network.one.weight is network.two.weight
    assert torch.equal(network.one.weight, values.double())
    up, down = torch.chunk(stored, 2)
    assert torch.equal(torch.cat([down, up]).read(), values[[1, 0]])  # type: ignore[attr-defined]
    assert torch.equal(stored.elements(1, 3), torch.tensor([1.0, 2.0]))
    with pytest.raises(NotImplementedError):
        stored.mul_(2)


def test_an_adapter_is_merged_as_peft_merges_it(tiny_world: Path) -> None:
    family = build("sd3", tiny_world / "base", torch.bfloat16)
    network = family.load_transformer()
    lora.load_adapter(network, "x", tiny_world / "adapter")
    lora.activate(network, "x")
    wanted = lora.merged_weights(network)
    found = family.load_transformer(adapter=tiny_world / "adapter").state_dict()
    plain = family.load_transformer().state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name].to(value.dtype)) for name, value in found.items())
    assert sum(not torch.equal(value, plain[name]) for name, value in found.items()) == len(network.peft_config) * 8


@pytest.mark.extended
@pytest.mark.multirank
def test_two_ranks_own_what_one_would_hold(tmp_path: Path) -> None:
    """Every family, plain, offloaded and with hpZ; a LoRA student; a `zero_inference` teacher. See the script."""
    launch(2, str(tmp_path), script=sharded_loading_ranks.__name__)
    assert json.loads((tmp_path / "done.json").read_text()) == list(FAMILIES)
