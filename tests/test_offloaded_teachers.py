"""Teachers that travel, with the CPU for a device, to which weights are copied, and streams that note."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading

from opd_ds.config.schema import TeacherSection
from opd_ds.models import build_family
from opd_ds.training.teachers import TeacherPool, TeacherSpec, _Network, _side_stream


class Stream:
    """Notes what was waited for, and how many there are."""

    made = 0
    waited: list[Any]

    def __init__(self, device: torch.device | None = None) -> None:
        self.waited = []
        Stream.made += 1

    def __enter__(self) -> None: ...

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
    monkeypatch.setattr(_Network, "needs_transfer", True)
    monkeypatch.setattr(Stream, "made", 0)
    _side_stream.cache_clear()
    yield stream
    _side_stream.cache_clear()


@pytest.mark.parametrize("room", [True, False])
def test_the_next_teacher_sets_out_while_this_one_is_asked(
    tiny_world: Path, computing: Stream, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    monkeypatch.setattr("opd_ds.training.teachers.free_memory", lambda device: 10**9 if room else 0)
    cpu = torch.device("cpu")
    family = build_family("sd3", tiny_world / "base", dtype=torch.float32, device=cpu, max_text_length=10)
    specs = {
        task: TeacherSpec(TeacherSection(path=str(path), placement="offload"), path)
        for task, path in (("one", tiny_world / "other"), ("two", tiny_world / "base"))
    }
    pool = TeacherPool(family, specs, cpu)
    networks = {task: pool._networks[task].module for task in specs}
    homes = {task: {name: p.data_ptr() for name, p in network.named_parameters()} for task, network in networks.items()}
    before = {task: {name: p.clone() for name, p in network.named_parameters()} for task, network in networks.items()}

    def away(task: str) -> bool:
        moved = {p.data_ptr() != homes[task][name] for name, p in networks[task].named_parameters()}
        assert len(moved) == 1  # all together
        return moved.pop()

    for _ in range(2):
        with pool.active("one"):
            assert (away("one"), away("two")) == (True, False)
            pool.prefetch("two")
            assert (pool._networks["two"]._coming is not None) == room
        assert pool._networks["one"]._coming is None
        with pool.active("two"):
            assert (away("one"), away("two")) == (False, True)
            pool.prefetch("two")  # it is there: nothing more to do
            assert all(torch.equal(p, before["two"][name]) for name, p in networks["two"].named_parameters())
        assert not away("two")
    assert len(computing.waited) == 4  # every visit waits for its own weights
    assert Stream.made == 1


def test_a_streamed_teacher_comes_block_by_block(tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By diffusers' group offloading, here with the CPU as the device and without streams; the numbers are the same."""
    asked: dict[str, Any] = {}

    def offloading(module: torch.nn.Module, **settings: Any) -> None:
        asked.update(settings)
        here = {"onload_device": torch.device("cpu"), "use_stream": False, "record_stream": False}
        apply_group_offloading(module, **settings | here)

    monkeypatch.setattr("opd_ds.training.teachers.apply_group_offloading", offloading)
    cpu = torch.device("cpu")
    family = build_family("sd3", tiny_world / "base", dtype=torch.float32, device=cpu, max_text_length=10)
    streamed = _Network(family.load_transformer(tiny_world / "other"), "stream", torch.device("cuda"), None)
    plain = family.load_transformer(tiny_world / "other")
    latents, sigma, cond = torch.randn(2, *family.latent_shape), torch.full((2,), 0.5), family.encode(["a", "b"])
    with torch.no_grad(), streamed.on_device():
        found = family.velocity(streamed.forward, latents, sigma, cond)
        assert torch.equal(found, family.velocity(plain, latents, sigma, cond))
    assert (asked["onload_device"].type, asked["use_stream"], asked["record_stream"]) == ("cuda", True, True)
    assert (asked["offload_type"], asked["num_blocks_per_group"]) == ("block_level", 1)


def test_a_prefetch_that_finds_no_room_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory may be in pieces; the weights come when the teacher is asked."""

    def full(self: _Network) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("opd_ds.training.teachers.free_memory", lambda device: 10**9)
    monkeypatch.setattr(_Network, "needs_transfer", True)
    monkeypatch.setattr(_Network, "fetch", full)
    pool = object.__new__(TeacherPool)
    pool._device = torch.device("cpu")
    pool._networks = {"one": _Network(torch.nn.Linear(2, 2), "offload", pool._device, None)}
    pool.prefetch("one")
