"""Teachers that travel, with the CPU in the place of a device: streams that note what they were asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from opd_ds.config.teachers import TeacherSection
from opd_ds.models import ModelFamily, ParametersElsewhere, block_names, build_family
from opd_ds.models.host_weights import HostMemory, HostWeights, side_stream
from opd_ds.training.frozen_networks import Offloaded, Streamed
from opd_ds.training.teachers import TeacherPool, TeacherSpec

CPU = torch.device("cpu")


class Stream:
    """Notes what was waited for, and how many there are."""

    made = 0
    entered = 0
    waited: list[Any]

    def __init__(self, device: torch.device | None = None) -> None:
        self.waited = []
        Stream.made += 1

    def __enter__(self) -> None:
        Stream.entered += 1

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)


@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """The stream that the device computes on."""
    stream = Stream()
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(HostWeights, "needs_transfer", True)
    monkeypatch.setattr(Stream, "made", 0)
    monkeypatch.setattr(Stream, "entered", 0)
    side_stream.cache_clear()
    yield stream
    side_stream.cache_clear()


@pytest.fixture
def family(tiny_world: Path) -> ModelFamily:
    return tiny_family(tiny_world, "resident")


def tiny_family(world: Path, text_encoders: str) -> ModelFamily:
    settings = {"max_text_length": 10, "text_encoders": text_encoders}
    return build_family("sd3", world / "base", dtype=torch.float32, device=CPU, **settings)


def pool_of(family: ModelFamily, placement: str, **paths: Path) -> TeacherPool:
    specs = {
        task: TeacherSpec(TeacherSection(path=str(path), placement=placement), path)  # type: ignore[arg-type]
        for task, path in paths.items()
    }
    return TeacherPool(family, specs, CPU)


def weights_of(pool: TeacherPool, task: str) -> HostWeights:
    network = pool._networks[task]
    assert isinstance(network, Offloaded)
    return network._weights


def places(module: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def answer(family: ModelFamily, network: Any) -> torch.Tensor:
    torch.manual_seed(0)
    latents, cond = torch.randn(2, *family.latent_shape), family.encode(["a", "b"])
    with torch.no_grad():
        return family.velocity(network, latents, torch.full((2,), 0.5), cond)


@pytest.mark.parametrize("fits", [True, False])
def test_the_next_teacher_sets_out_while_this_one_is_asked(
    tiny_world: Path, family: ModelFamily, computing: Stream, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    monkeypatch.setattr("opd_ds.training.frozen_networks.free_memory", lambda device: 10**9 if fits else 0)
    pool = pool_of(family, "offload", one=tiny_world / "other", two=tiny_world / "base")
    with pool.active("one") as one, pool.active("two") as two:
        networks = {"one": one, "two": two}
    homes = {task: places(network) for task, network in networks.items()}
    before = {name: p.clone() for name, p in networks["two"].named_parameters()}
    computing.waited.clear()

    def away(task: str) -> bool:
        moved = {place != homes[task][name] for name, place in places(networks[task]).items()}
        assert len(moved) == 1  # all together
        return moved.pop()

    for _ in range(2):
        with pool.active("one"):
            assert (away("one"), away("two")) == (True, False)
            pool.prefetch("two")
            assert (weights_of(pool, "two")._copies is not None) == fits
        assert weights_of(pool, "one")._copies is None
        with pool.active("two"):
            assert (away("one"), away("two")) == (False, True)
            assert all(torch.equal(p, before[name]) for name, p in networks["two"].named_parameters())
        assert not away("two")
    assert len(computing.waited) == 4  # every visit waits for its own weights
    assert Stream.made == 1


def test_a_prefetch_that_finds_no_room_is_no_error(
    tiny_world: Path, family: ModelFamily, computing: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free and what can be had in one piece may differ."""
    monkeypatch.setattr("opd_ds.training.frozen_networks.free_memory", lambda device: 10**9)
    pool = pool_of(family, "offload", one=tiny_world / "other", two=tiny_world / "base")
    fetch = HostWeights._fetch

    def out_of_memory(self: HostWeights) -> None:
        raise torch.OutOfMemoryError

    with pool.active("one"):
        monkeypatch.setattr(HostWeights, "_fetch", out_of_memory)
        pool.prefetch("two")
        monkeypatch.setattr(HostWeights, "_fetch", fetch)
    with pool.active("two") as network:
        assert torch.equal(answer(family, network), answer(family, family.load_transformer()))


def test_loras_of_one_offloaded_base_come_with_it_once(
    tiny_world: Path, family: ModelFamily, computing: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a teacher of another network stands between them in the config."""
    monkeypatch.setattr("opd_ds.training.frozen_networks.free_memory", lambda device: 10**9)
    paths = {"one": tiny_world / "adapter", "full": tiny_world / "other", "two": tiny_world / "adapter2"}
    pool, resident = pool_of(family, "offload", **paths), pool_of(family, "resident", **paths)
    order = pool.in_turn(paths)
    assert order == ["one", "two", "full"]
    for task, then in zip(order, [*order[1:], None], strict=True):
        with pool.active(task) as network, resident.active(task) as expected:
            if then is not None:
                pool.prefetch(then)
            assert torch.equal(answer(family, network), answer(family, expected))
    assert Stream.entered == 2
    assert all(weights_of(pool, task)._copies is None for task in paths)


def test_weights_are_packed_once_and_never_copied_back(family: ModelFamily, tiny_world: Path) -> None:
    """One buffer of the weights' own size, whatever their sizes are."""
    module = family.load_transformer(tiny_world / "other")
    tensors = [*module.parameters(), *module.buffers()]
    size, before = sum(tensor.nbytes for tensor in tensors), [tensor.clone() for tensor in tensors]
    weights = HostWeights(module, CPU)
    assert size <= weights.nbytes < size + 256 * len(tensors)
    start = weights._packed.data_ptr()
    for tensor, value in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert start <= tensor.data_ptr() < start + weights.nbytes
        assert tensor.data_ptr() % 4 == 0
        assert tensor.untyped_storage().data_ptr() == start


def test_a_network_without_weights_takes_those_of_another_process(family: ModelFamily, tiny_world: Path) -> None:
    """Buffers in another dtype included: what is packed says how it is read."""

    class Both(HostMemory):
        """The first network fills, the second reads."""

        def __init__(self) -> None:
            self._agreed: Any = None
            self._buffer: torch.Tensor | None = None

        def agreed(self, value: Any) -> Any:
            self._agreed = value if self.fills else self._agreed
            return self._agreed

        def buffer(self, nbytes: int) -> Any:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8) if self.fills else self._buffer
            return nullcontext(self._buffer)

    memory, full = Both(), family.load_transformer(tiny_world / "other")
    full.pos_embed.pos_embed = full.pos_embed.pos_embed.double()  # type: ignore[union-attr]
    HostWeights(full, CPU, memory)
    memory.fills = False
    empty = family.load_transformer(tiny_world / "other", ParametersElsewhere())
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    HostWeights(empty, CPU, memory)
    ours, theirs = full.state_dict(), empty.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert places(full) == places(empty)


def test_a_streamed_teacher_comes_block_by_block(tiny_world: Path, family: ModelFamily, computing: Stream) -> None:
    """Two buffers take turns, the next block is on its way while one computes, nothing goes back; numbers are equal."""
    module, plain = (family.load_transformer(tiny_world / "other") for _ in range(2))
    blocks = block_names(module)
    streamed = Streamed(module, CPU, None)
    weights = streamed._stream._weights
    packed, homes = weights._packed.clone(), places(module)
    seen: list[tuple[str, int | None, int]] = []
    for name in blocks:
        block = module.get_submodule(name)
        inner = block.forward

        def forward(*args: Any, name: str = name, inner: Any = inner, block: nn.Module = block, **more: Any) -> Any:
            inside = {p.untyped_storage().data_ptr() for p in block.parameters()}
            seen.append((name, streamed._stream._coming, *inside))
            return inner(*args, **more)

        block.forward = forward  # type: ignore[method-assign]
    expected = answer(family, plain)
    with streamed.asked(None) as network:
        for _ in range(3):
            assert torch.equal(answer(family, network), expected)
    assert len(seen) == 3 * len(blocks)
    assert Stream.entered == 1 + len(seen)  # each block once a forward, and the first
    for index, (name, coming, place) in enumerate(seen):
        assert name == blocks[index % len(blocks)]
        assert coming == (index + 1) % len(blocks)
        assert place == seen[index % 2][2]
    assert len({place for *_, place in seen}) == 2
    assert places(module) == homes
    assert torch.equal(weights._packed, packed)
    assert not streamed._stream._buffers
    with streamed.asked(None) as network:  # and again
        assert torch.equal(answer(family, network), expected)


def test_offloaded_text_encoders_come_once_a_call_and_are_never_copied_back(
    tiny_world: Path, family: ModelFamily, computing: Stream
) -> None:
    prompts = [f"prompt {number}" for number in range(11)]  # two passes
    offloaded, expected = tiny_family(tiny_world, "offload"), family.encode(prompts)
    for visits in (1, 2):
        found = offloaded.encode(prompts)
        assert all(torch.equal(value, found.tensors[name]) for name, value in expected.tensors.items())
        assert Stream.entered == visits
    weights = offloaded.loaded.encoder_weights
    assert weights is not None
    assert weights._copies is None
    for encoder in (offloaded.loaded.encoders.text_encoder, offloaded.loaded.encoders.text_encoder_3):
        assert {p.untyped_storage().data_ptr() for p in encoder.parameters()} == {weights._packed.data_ptr()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("placement", ["offload", "stream"])
def test_weights_travel_from_registered_memory(tiny_world: Path, placement: str) -> None:
    device = torch.device("cuda", 0)
    family = build_family("sd3", tiny_world / "base", dtype=torch.bfloat16, device=device, max_text_length=10)
    path = tiny_world / "other"
    spec = TeacherSpec(TeacherSection(path=str(path), placement=placement), path)  # type: ignore[arg-type]
    pool, cond = TeacherPool(family, {"one": spec}, device), family.encode(["a", "b"])
    plain = family.load_transformer(path).to(device)
    latents, sigma = torch.randn(2, *family.latent_shape, device=device), torch.full((2,), 0.5, device=device)
    network = pool._networks["one"]
    weights = network._weights if isinstance(network, Offloaded) else network._stream._weights  # type: ignore[attr-defined]
    assert weights._packed.is_pinned()
    for _ in range(3):
        with torch.no_grad(), pool.active("one") as teacher:
            assert torch.equal(
                family.velocity(teacher, latents, sigma, cond), family.velocity(plain, latents, sigma, cond)
            )
