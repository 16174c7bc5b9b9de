"""Prompt sets in little memory: the same values, the same hash, the same draws."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_ds.data import PromptSet, draw_prompts, packed
from opd_ds.data.packed import mappings, texts
from opd_ds.diffusion.noise import sample_seed


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)))), st.integers(0, 9), st.integers(0, 9))
def test_packed_values_are_the_sequence_of_them(values: list[str], start: int, stop: int) -> None:
    packer = texts()
    for value in values:
        packer.append(value)
    found = packer.done()
    assert list(found) == [found[place] for place in range(len(found))] == values
    assert found == tuple(values)
    assert list(found[start:stop]) == values[start:stop]
    assert found[:None] == values
    assert (found == [*values, "more"]) is False
    with pytest.raises(IndexError):
        found[len(values)]


def test_values_go_to_a_file_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_IN_MEMORY", 1000)
    packer = mappings()
    values = [{"number": number, "place": ("a", None)} if number % 3 else {} for number in range(100)]
    for value in values:
        packer.append(value)
    found = packer.done()
    assert not isinstance(found._buffer, bytes)
    assert list(found) == [found[place] for place in range(100)] == values
    assert found[90:] == values[90:]


def test_the_hash_is_that_of_the_whole_list(tmp_path: Path) -> None:
    """As checkpoints have it."""
    rows = [{"prompt": "caf\u00e9", "tag": "x", "n": 1.5}, {"prompt": "b", "n": None, "tag": ["y"]}]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [[row.pop("prompt"), row] for row in rows]
    expected = hashlib.sha256(json.dumps(pairs, sort_keys=True).encode()).hexdigest()
    assert PromptSet.read(file).sha256 == expected


def test_drawn_prompts_are_those_of_whole_permutations() -> None:
    generator = torch.Generator().manual_seed(sample_seed(7, 1, "t/prompts", 0))
    second = torch.randperm(10, generator=generator).tolist()
    assert draw_prompts(10, 5, 7, 2, "t") + draw_prompts(10, 5, 7, 3, "t") == second


def test_a_set_takes_little_more_than_its_file(tmp_path: Path) -> None:
    file = tmp_path / "many.txt"
    file.write_text("".join(f"a photograph of {number} cats\n" for number in range(20_000)))
    tracemalloc.start()
    found = PromptSet.read(file)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = file.stat().st_size + 2 * 8 * len(found)
    assert kept < 1.5 * size
    assert peak < 3 * size
    assert found.repeats == 0
