"""Hashes of weights: by meaning where the bytes vary, by bytes where damage must show."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save

from opd_ds.utils.hashing import file_sha256, weights_sha256


def reordered(data: bytes) -> bytes:
    """The same safetensors file with its header's entries the other way round."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    return data[:8] + text + data[8 + length :]


def test_weights_are_hashed_by_meaning(tmp_path: Path) -> None:
    data = save({"a": torch.arange(4.0), "b": torch.ones(2)}, {"x": "1", "y": "2"})
    for name, content in {"one": data, "two": reordered(data), "three": save({"a": torch.arange(4.0)})}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.safetensors").write_bytes(content)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert (one / "w.safetensors").read_bytes() != (two / "w.safetensors").read_bytes()
    assert weights_sha256(one) == weights_sha256(two) != weights_sha256(three)
    assert file_sha256(one) != file_sha256(two)


def test_all_that_is_loaded_is_hashed(tmp_path: Path) -> None:
    """A tokenizer's files, folders behind links, the configuration that PEFT keeps beside a file."""
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    (model / "tokenizer").mkdir(parents=True)
    elsewhere.mkdir()
    (model / "transformer").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(model)  # a circle
    changed = [model / "tokenizer" / "merges.txt", model / "tokenizer" / "spiece.model", elsewhere / "config.json"]
    adapter = tmp_path / "lora" / "adapter_model.safetensors"
    adapter.parent.mkdir()
    for file in (*changed, adapter, adapter.with_name("adapter_config.json"), model / "README.md"):
        file.write_bytes(b"1")
    for file, hashed in (*((file, model) for file in changed), (adapter.with_name("adapter_config.json"), adapter)):
        before = weights_sha256(hashed)
        file.write_bytes(b"2")
        assert weights_sha256(hashed) != before, file
    before = weights_sha256(model)
    (model / "README.md").write_bytes(b"2")
    assert weights_sha256(model) == before


def test_what_is_no_safetensors_file_is_hashed_all_the_same(tmp_path: Path) -> None:
    hashes = set()
    for content in (b"", b"short", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}rest"):
        (tmp_path / "w.safetensors").write_bytes(content)
        hashes.add(weights_sha256(tmp_path / "w.safetensors"))
    assert len(hashes) == 4
