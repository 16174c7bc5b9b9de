"""`opd-ds data encode`: every prompt and reference picture of a run through the encoders, once."""

from __future__ import annotations

from pathlib import Path

import typer

from opd_ds.cluster.world import World
from opd_ds.config.schema import RunConfig
from opd_ds.data import check_sizes
from opd_ds.data.text_cache import TextCache, encoders_identity
from opd_ds.diffusion.rollout import chunks
from opd_ds.engine import Group
from opd_ds.models import REFERENCE, Conditioning
from opd_ds.runs.encodings import Wanted, check_pictures
from opd_ds.runs.files import find_prompts, sets_by_key
from opd_ds.training.networks import find_base, load_family

PER_SHARD = 256


def encode_prompts(config: RunConfig, group: Group, output: Path | None = None) -> None:
    """Encode what is missing in the run's text cache, or in `output`; ranks share the work. Collective.

    Raises:
        UserError: prompts, pictures or model are not there, or the folder was written by other encoders.
    """
    world = group.world
    with group.raise_on_any_rank():
        model = find_base(config)
        sets = sets_by_key(config, *find_prompts(config))
        cache = TextCache(output or config.text_cache)
        if world.is_main:
            cache.claim(encoders_identity(config, model))
    with group.raise_on_any_rank():
        encoders = config.model.model_copy(update={"text_encoders": "resident"})
        family = load_family(config.model_copy(update={"model": encoders}), model, group.device)
        check_sizes(config.model, family, sets)
        check_pictures(config, family, sets, decode=False)
        wanted = Wanted.of(config.model, family, sets.values())
        texts = cache.missing(list(wanted.texts)[world.rank :: world.size])
        pictures = cache.missing(list(wanted.pictures)[world.rank :: world.size])
    counts, everything = group.gather(len(texts) + len(pictures)), len(wanted.texts) + len(wanted.pictures)
    if world.is_main:
        what = f"{len(wanted.texts)} prompts" + f" and {len(wanted.pictures)} pictures" * bool(wanted.pictures)
        typer.echo(f"{what}, {everything - sum(counts)} of them encoded already in {cache.folder}")
    done = 0
    alone, beside = ([name for name in texts if bool(wanted.texts[name][1]) is seen] for seen in (False, True))
    for names in (alone, beside):  # what the text encoder sees with pictures may have further tensors
        for part in (names[block] for block in chunks(len(names), PER_SHARD)):
            prompts, pictures_of = zip(*(wanted.texts[name] for name in part), strict=True)
            cache.add(dict(zip(part, family.encode_texts(list(prompts), pictures_of).apart(), strict=True)))
            done += len(part)
            _say_progress(world, done, len(texts), "prompts")
    done = 0
    for part in (pictures[block] for block in chunks(len(pictures), PER_SHARD)):
        found = {name: wanted.pictures[name] for name in part}
        latents = {name: at.encode_picture(picture) for name, (picture, at) in found.items()}
        cache.add({name: Conditioning({REFERENCE: own[None]}) for name, own in latents.items()})
        done += len(part)
        _say_progress(world, done, len(pictures), "pictures")
    group.barrier()
    if world.is_main:
        size = sum(file.stat().st_size for file in cache.folder.glob("shard-*.safetensors"))
        typer.echo(f"done: {size / 1e9:.2f} GB; start the run with model.text_encoders=cached{_where(config, output)}")


def _say_progress(world: World, done: int, all_of_rank: int, what: str) -> None:
    if world.is_main:
        typer.echo(f"{done} of {all_of_rank} {what} encoded" + " by rank 0" * (world.size > 1))


def _where(config: RunConfig, output: Path | None) -> str:
    same = output is None or output.absolute() == config.text_cache.absolute()
    return "" if same else f" and model.text_cache={output}"
