"""Encoded prompts on disk: the same numbers without a text encoder, refused when they are not the run's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import opd_ds.runs.encode
from opd_ds.cli.main import app
from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.schema import RunConfig
from opd_ds.data.text_cache import TextCache, trimmed
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.models import Conditioning, ModelFamily
from opd_ds.models.host_weights import HostWeights
from opd_ds.runs.encode import encode_prompts
from opd_ds.runs.evaluate import Choice, evaluate
from opd_ds.runs.preflight import preflight
from opd_ds.runs.setup import Parts, prepare
from opd_ds.training.networks import load_family
from opd_ds.utils.pictures import Picture
from tests.tiny import PROMPTS, run_settings, with_changes, write_config

Build = Callable[..., tuple[RunConfig, Parts]]
PIPELINE = "StableDiffusion3Pipeline"


@pytest.fixture
def settings(tiny_world: Path, tmp_path: Path) -> dict[str, Any]:
    """A run with prompts of all kinds: training, held-out, a probe's, a negative prompt."""
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("a held-out 4\na red 3 on blue\n")
    probe = tmp_path / "probe.txt"
    probe.write_text("a probed 6 of many words\n")
    data = run_settings(tiny_world, tmp_path / "out", model__negative_prompt="a poor 2", evaluation__steps=2)
    data["tasks"]["one"]["eval_prompts"] = str(held_out)
    data["probes"] = {"other": {"eval_prompts": str(probe)}}
    return data


def config_of(settings: dict[str, Any], **changes: Any) -> DistilConfig:
    return DistilConfig.model_validate(with_changes(json.loads(json.dumps(settings)), changes))


def cached(settings: dict[str, Any], **changes: Any) -> DistilConfig:
    return config_of(settings, model__text_encoders="cached", **changes)


def two_rounds(config: RunConfig, group: Group) -> list[Any]:
    """All that two rounds and an evaluation measure, to the last bit."""
    parts = prepare(config, group)
    reports = [parts.trainer.run_round(index) for index in range(2)]
    drawn = parts.evaluator.draw(parts.student.module, {"one": 2.0, "other": 1.0}, 2)
    pictures = [image.tobytes() for shown in drawn.values() for _, image in shown]
    return [[(r.losses.loss, r.losses.means, r.grad_norm) for r in reports], pictures]


def forbid_text_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("text encoders were loaded")

    monkeypatch.setattr(getattr(diffusers, PIPELINE), "from_pretrained", refuse)


def test_cached_prompts_train_the_same_without_text_encoders(
    settings: dict[str, Any], group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(settings)
    offloaded = two_rounds(config, group)
    encode_prompts(config, group)
    forbid_text_encoders(monkeypatch)
    with pytest.raises(UserError, match="text encoders were loaded"):
        load_family(config, Path(config.model.path), group.device).encode(["a red 3 on blue"])
    assert two_rounds(cached(settings), group) == offloaded


def test_what_is_missing_is_found_before_anything_loads(
    settings: dict[str, Any], tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelFamily, "load_transformer", lambda *_: pytest.fail("a network was loaded"))
    config = cached(settings)
    with pytest.raises(UserError, match=r"there is none yet for 8 prompts; run `opd-ds data encode` with"):
        prepare(config, group)
    encode_prompts(config, group)
    preflight(config, group, group.world, None)
    more = tmp_path / "more.txt"
    more.write_text("the number 5\nunseen one\nunseen two\n")
    lacking = cached(settings, tasks__two__prompts=str(more))
    with pytest.raises(UserError, match=r"2 of 10 prompts are not encoded, the first: 'unseen one'; run `opd-ds data"):
        prepare(lacking, group)
    file = write_config(tmp_path / "run.yaml", lacking.model_dump(mode="json"))
    dry = CliRunner().invoke(app, ["train", "--config", str(file), "--dry-run"])
    assert "2 of 10 prompts are not encoded" in str(dry.exception)
    with pytest.raises(UserError, match="2 of 7 prompts are not encoded"):  # those of an evaluation
        evaluate(config, Choice(prompts=[f"more={more}"]), group)


def test_other_encoders_are_refused(settings: dict[str, Any], tiny_world: Path, tmp_path: Path, group: Group) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_world / "base", base)
    settings["model"]["path"] = str(base)
    encode_prompts(config_of(settings), group)
    for changes, said in (
        ({"model__max_text_length": 9}, "max_text_length was 10 and is 9"),
        ({"precision": "bf16"}, "precision was 'fp32' and is 'bf16'"),
    ):
        with pytest.raises(UserError, match=said):
            preflight(cached(settings, **changes), group, group.world, None)
    # What is no part of encoding may change.
    shutil.rmtree(base / "transformer")
    shutil.copytree(tiny_world / "other" / "transformer", base / "transformer")
    preflight(cached(settings), group, group.world, None)
    vocabulary = base / "tokenizer" / "tokenizer_config.json"
    vocabulary.write_text(vocabulary.read_text() + "\n")
    with pytest.raises(UserError, match=r"other encoders: tokenizer/tokenizer_config.json has changed; remove"):
        preflight(cached(settings), group, group.world, None)
    with pytest.raises(UserError, match="has changed"):
        encode_prompts(config_of(settings), group)
    vocabulary.unlink()
    with pytest.raises(UserError, match=r"tokenizer/tokenizer_config.json is gone"):
        preflight(cached(settings), group, group.world, None)


def test_a_second_call_encodes_what_the_first_left(
    settings: dict[str, Any], tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, encoded = config_of(settings), []
    honest = ModelFamily.encode_texts

    def encode(family: ModelFamily, prompts: list[str], pictures: Sequence[tuple[Picture, ...]] = ()) -> Conditioning:
        if encoded:
            raise KeyboardInterrupt
        encoded.extend(prompts)
        return honest(family, prompts, pictures)

    monkeypatch.setattr(ModelFamily, "encode_texts", encode)
    monkeypatch.setattr(opd_ds.runs.encode, "PER_SHARD", 3)
    with pytest.raises(KeyboardInterrupt):
        encode_prompts(config, group, tmp_path / "cache")
    (shard,) = (tmp_path / "cache").glob("shard-*")
    assert len(encoded) == 3
    (tmp_path / "cache" / ".shard-0.tmp").write_bytes(b"half a shard")
    kept, encoded[:] = list(encoded), []
    monkeypatch.setattr(ModelFamily, "encode_texts", lambda f, p, own=(): (encoded.extend(p), honest(f, p, own))[1])
    encode_prompts(config, group, tmp_path / "cache")
    assert len(encoded) == 5
    assert sorted(kept + encoded) == sorted({*PROMPTS, "a held-out 4", "a probed 6 of many words", "a poor 2"})
    encode_prompts(config, group, tmp_path / "cache")
    assert len(encoded) == 5

    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"{shard.name} is damaged .* remove it and run"):
        preflight(cached(settings, model__text_cache=str(tmp_path / "cache")), group, group.world, None)


def test_ranks_share_the_work(settings: dict[str, Any], group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    config, encoded = config_of(settings), []
    honest = ModelFamily.encode_texts
    monkeypatch.setattr(ModelFamily, "encode_texts", lambda f, p, own=(): (encoded.append(p), honest(f, p, own))[1])
    monkeypatch.setattr(Group, "gather", lambda self, value: [value])  # the ranks one after another
    monkeypatch.setattr(Group, "barrier", lambda self: None)
    for rank in (0, 2, 1):
        encode_prompts(config, Group(World(rank, 0, 3, 1), group.device))
    assert [len(prompts) for prompts in encoded] == [3, 2, 3]
    preflight(cached(settings), group, group.world, None)


def test_the_command(settings: dict[str, Any], tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_ds.engine.init_group", lambda world: nullcontext(group))
    file = write_config(tmp_path / "run.yaml", settings)
    arguments = ["encode", "--config", str(file), "--set", "precision=bf16", "--output", str(tmp_path / "cache")]
    said = CliRunner().invoke(app, ["data", *arguments], catch_exceptions=False).output
    assert "8 prompts, 0 of them encoded already" in said
    assert f"model.text_encoders=cached and model.text_cache={tmp_path / 'cache'}" in said
    (shard,) = (tmp_path / "cache").glob("shard-*")
    assert {tensor.dtype for tensor in load_file(shard).values()} == {torch.bfloat16}
    assert shard.stat().st_mode & 0o777 == (tmp_path / "cache" / "manifest.json").stat().st_mode & 0o777


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_not_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    lengths, longest, width = [2, 5, 1, 0], 6, 3
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    embeds = torch.randn(4, longest, width).to(dtype) * mask[:, :, None]
    # As wide as the prompts are long, and no padding in it.
    cond = Conditioning({"embeds": embeds, "pooled": torch.randn(4, longest).to(dtype), "mask": mask})
    cache, names = TextCache(tmp_path), ["two", "five", "one", "none"]
    cache.claim({"files": {}})
    cache.add(dict(zip(names, cond.apart(), strict=True)))
    cache = TextCache(tmp_path)
    assert [len(cache.read([name]).tensors["mask"][0]) for name in names] == [2, 5, 1, 1]
    together = cache.read(names)
    for name, tensor in cond.tensors.items():
        expected = tensor if name == "pooled" else tensor[:, :5]
        assert together.tensors[name].dtype == tensor.dtype
        assert torch.equal(together.tensors[name], expected), name
    assert torch.equal(cache.read(["one", "five", "one"]).tensors["embeds"][:, :5], embeds[[2, 1, 2], :5])


def test_many_shards_are_one_cache_and_a_foreign_file_is_named(tmp_path: Path) -> None:
    """Entries of several kinds, found whatever shard they are in, of which few are open; also after more were added."""
    names, writer = [f"prompt {number}" for number in range(200)], TextCache(tmp_path)
    writer.claim({"files": {}})
    rows = [Conditioning({"embeds" if row % 3 else "pictures": torch.full((1, 2), float(row))}) for row in range(200)]
    for first in range(0, 198, 2):
        writer.add(dict(zip(names[first : first + 2], rows[first : first + 2], strict=True)))
    cache = TextCache(tmp_path)
    assert cache.missing([names[199], names[0], names[198], names[199]]) == [names[199], names[198]]
    for row in (197, 0, 3, 196, 4, 0):
        assert {key: value.tolist() for key, value in cache.read([names[row]]).tensors.items()} == {
            "embeds" if row % 3 else "pictures": [[row, row]]
        }
    cache.add({names[198]: rows[198]})
    assert cache.missing(names) == [names[199]]
    save_file({"weight": torch.zeros(2)}, tmp_path / "shard-0.safetensors")
    with pytest.raises(UserError, match=r"shard-0\.safetensors is damaged .* remove it and run"):
        TextCache(tmp_path).missing(names)


def test_padding_that_is_attended_to_stays() -> None:
    no_mask = Conditioning({"embeds": torch.zeros(1, 7, 2)})
    assert trimmed(no_mask).tensors["embeds"].shape == (1, 7, 2)
    broken = Conditioning({"embeds": torch.ones(1, 7, 2), "mask": torch.arange(7)[None] < 3})
    assert trimmed(broken).tensors["embeds"].shape == (1, 7, 2)


def test_offloaded_encoders_travel_once_a_round(build_run: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all tasks together, and a prompt that is drawn twice is encoded once."""
    _, parts = build_run(rollout__samples=4)
    trips, passes = [], []
    move, encode = HostWeights.on_device, ModelFamily.encode
    monkeypatch.setattr(HostWeights, "on_device", lambda self: (trips.append(self), move(self))[1])
    monkeypatch.setattr(ModelFamily, "encode", lambda self, asked: (passes.append(asked), encode(self, asked))[1])
    parts.trainer.run_round(0)
    assert len(trips) == 1
    (asked,) = passes
    assert len(set(asked)) == len(asked) <= len(PROMPTS) < 2 * 4
