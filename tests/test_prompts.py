"""Prompts and noise are named by the sample, never by the rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_ds.config.sections import TrainedSteps
from opd_ds.data import PromptSet, draw_prompts, shard
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.errors import UserError
from opd_ds.training.steps import choose_steps


@given(st.integers(1, 50), st.integers(1, 9))
def test_shards_cover_every_sample_once_with_equal_counts(total: int, world: int) -> None:
    parts = [shard(total, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    owned = [i for part in parts for i, w in zip(part.indices, part.weights.tolist(), strict=True) if w == 1]
    assert owned == list(range(total))
    assert all(0 <= i < total for part in parts for i in part.indices)


def test_noise_depends_on_the_sample_alone() -> None:
    seeds = [sample_seed(0, 3, "text", i) for i in range(6)]
    whole = SampleNoise(seeds, (2, 3))
    first, second = whole.draw(slice(None)), whole.draw(slice(None))
    part = SampleNoise(seeds[2:5], (2, 3))
    assert torch.equal(part.draw(slice(0, 2)), first[2:4])
    assert torch.equal(part.draw(slice(0, 2)), second[2:4])
    assert torch.equal(part.draw(slice(2, 3)), first[4:5])


def test_seeds_differ_in_every_coordinate() -> None:
    names = [(s, r, t, i) for s in range(3) for r in range(3) for t in ("a", "b") for i in range(3)]
    assert len({sample_seed(*name) for name in names}) == len(names)


@given(st.integers(1, 40), st.integers(1, 15))
def test_drawing_walks_through_permutations(count: int, samples: int) -> None:
    """Any `count` consecutive draws that start at a multiple of `count` are a permutation."""
    rounds = -(-3 * count // samples)
    drawn = [i for r in range(rounds) for i in draw_prompts(count, samples, 0, r, "t")]
    for start in range(0, 3 * count, count):
        assert sorted(drawn[start : start + count]) == list(range(count))


def test_random_queries_are_named_by_the_sample() -> None:
    setting = TrainedSteps(queries=3)
    whole = choose_steps(setting, 10, 0, 5, "t", list(range(8)))
    assert torch.equal(choose_steps(setting, 10, 0, 5, "t", [3, 4]), whole[3:5])
    assert all(len(set(row)) == 3 for row in whole.tolist())
    assert len({tuple(row) for row in whole.tolist()}) > 1
    # The paper's setting: nine of ten, the last never.
    assert choose_steps(TrainedSteps(fraction=0.99), 10, 0, 0, "t", [0]).tolist() == [list(range(9))]
    assert choose_steps(TrainedSteps(steps=(7, 2)), 10, 0, 0, "t", [0, 1]).tolist() == [[2, 7], [2, 7]]


def test_reading_files(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text('a "STOP" sign\n\n  a cat  \n')
    prompts = PromptSet.read(text)
    assert prompts.prompts == ('a "STOP" sign', "a cat")
    rows = tmp_path / "b.jsonl"
    rows.write_text('{"prompt": "two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]}\n')
    read = PromptSet.read(rows)
    assert read.prompts == ("two cats",)
    assert read.metadata[0]["tag"] == "counting"
    text.write_text('a "STOP" sign\na dog\n')
    assert PromptSet.read(text).sha256 != prompts.sha256


def test_reading_tables(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"prompt": ["a", "b"], "tag": ["x", "y"]}).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text('prompt,tag\na,x\n"b",y\n')
    tables = [PromptSet.read(tmp_path / name) for name in ("t.parquet", "t.csv")]
    assert tables[0] == tables[1]
    assert tables[0].metadata == ({"tag": "x"}, {"tag": "y"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "has no prompts"),
        ("a.txt", b"good\ncaf\xe9\n", r"line 2: not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', r"line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n', r"line 1: needs a non-empty text under 'prompt'"),
        ("a.jsonl", b'{"prompt": "  "}\n', r"line 1"),
        ("a.csv", b"text\nx\n", r"line 2: needs a non-empty"),
        ("a.parquet", b"nonsense", r"not readable as parquet"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        PromptSet.read(file)
    assert str(file) in str(caught.value)
