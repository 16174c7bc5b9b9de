"""`opd-ds data encode`: every prompt of a run through the text encoders, once."""

from __future__ import annotations

from pathlib import Path

import typer

from opd_ds.config.schema import RunConfig
from opd_ds.data.text_cache import TextCache, encoders_identity
from opd_ds.diffusion.rollout import chunks
from opd_ds.engine import Group
from opd_ds.runs.files import all_prompts, find_prompts
from opd_ds.training.networks import find_base, load_family

_PER_SHARD = 256


def encode_prompts(config: RunConfig, group: Group, output: Path | None = None) -> None:
    """Encode what is missing in the run's text cache, or in `output`; ranks share the prompts. Collective.

    Raises:
        UserError: prompts or model are not there, or the folder was written by other text encoders.
    """
    world = group.world
    with group.raise_on_any_rank():
        model = find_base(config)
        wanted = all_prompts(config, [found.prompts for sets in find_prompts(config) for found in sets.values()])
        cache = TextCache(output or config.text_cache)
        if world.is_main:
            cache.claim(encoders_identity(config, model))
    with group.raise_on_any_rank():
        missing = cache.missing(wanted[world.rank :: world.size])
        encoders = config.model.model_copy(update={"text_encoders": "resident"})
        family = load_family(config.model_copy(update={"model": encoders}), model, group.device)
    counts = group.gather(len(missing))
    if world.is_main:
        typer.echo(f"{len(wanted)} prompts, {len(wanted) - sum(counts)} of them encoded already in {cache.folder}")
    for block in chunks(len(missing), _PER_SHARD):
        cache.add(missing[block], family.encode(missing[block]))
        if world.is_main:
            typer.echo(f"{min(block.stop, len(missing))} of {len(missing)} encoded" + " by rank 0" * (world.size > 1))
    group.barrier()
    if world.is_main:
        size = sum(file.stat().st_size for file in cache.folder.glob("shard-*.safetensors"))
        typer.echo(f"done: {size / 1e9:.2f} GB; start the run with model.text_encoders=cached{_where(config, output)}")


def _where(config: RunConfig, output: Path | None) -> str:
    same = output is None or output.absolute() == config.text_cache.absolute()
    return "" if same else f" and model.text_cache={output}"
