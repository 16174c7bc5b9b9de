"""A round's prompts and pictures, encoded once over all ranks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from opd_ds.engine import Group
from opd_ds.models import ENCODED_AT_ONCE, Conditioning, ModelFamily
from opd_ds.utils.pictures import Picture
from opd_ds.utils.transfer import to_device

Key = TypeVar("Key", bound=Hashable)
Text = tuple[str, tuple[Picture, ...]]  # a prompt, and the pictures that the text encoder sees beside it


@dataclass(frozen=True)
class Asked:
    """What one batch of this rank wants encoded: of each row prompt, negative prompt, pictures, number of sample.

    Attributes:
        family: at the size of the batch's images.
    """

    family: ModelFamily
    prompts: Sequence[str]
    negatives: Sequence[str]
    pictures: Sequence[tuple[Picture, ...]]
    samples: Sequence[int]


def encode_batches(
    family: ModelFamily, group: Group, batches: Mapping[Key, Asked], *, own_negatives: bool
) -> dict[Key, Conditioning]:
    """All batches of a round together, each prompt and picture once, so that encoders which are offloaded travel once
    a round. Collective.

    Texts are encoded over all ranks; pictures, and texts that the text encoder sees with pictures, by the rank that
    asks for them. Where it sees pictures, or with `own_negatives`, rows have negatives of their own. A batch has
    pictures in all rows or in none, on all ranks.

    Args:
        own_negatives: equal on all ranks.
    """
    seen = family.sees_pictures and any(any(asked.pictures) for asked in batches.values())
    places: dict[Text, tuple[int, int]] = {}
    latents: dict[str, Tensor] = {}
    for number, asked in enumerate(batches.values()):
        for prompt, own, sample in zip(asked.prompts, asked.pictures, asked.samples, strict=True):
            beside = own if seen else ()
            places.setdefault((prompt, beside), (number, sample))
            for picture in own:
                if (name := asked.family.picture_name(picture)) not in latents:
                    latents[name] = asked.family.encode_picture(picture)
    own_negatives = own_negatives or seen
    if own_negatives:  # after all prompts, on any number of ranks
        for number, asked in enumerate(batches.values(), len(batches)):
            for negative, own, sample in zip(asked.negatives, asked.pictures, asked.samples, strict=True):
                places.setdefault((negative, own if seen else ()), (number, sample))
    together = {prompt: place for (prompt, beside), place in places.items() if not beside}
    alone = [text for text in places if text[1]]
    parts = [encode_over_ranks(family, group, together)] if together else []
    if alone:
        parts.append(family.encode_texts([prompt for prompt, _ in alone], [beside for _, beside in alone]))
    table = Conditioning.cat(parts)
    numbers = {text: row for row, text in enumerate([*((prompt, ()) for prompt in together), *alone])}

    def rows(prompts: Sequence[str], pictures: Sequence[tuple[Picture, ...]]) -> Conditioning:
        own = [numbers[prompt, beside if seen else ()] for prompt, beside in zip(prompts, pictures, strict=True)]
        return table.select(to_device(torch.tensor(own), group.device), own)

    return {
        key: rows(asked.prompts, asked.pictures).with_references(
            tuple(tuple(latents[asked.family.picture_name(picture)] for picture in own) for own in asked.pictures)
            if any(asked.pictures)
            else (),
            rows(asked.negatives, asked.pictures) if own_negatives else None,
        )
        for key, asked in batches.items()
    }


def encode_over_ranks(family: ModelFamily, group: Group, asked: dict[str, tuple[int, int]]) -> Conditioning:
    """One row for each prompt of this rank, in order. Each prompt of all ranks is encoded by one of them, in the passes
    in which a single rank would encode it, and goes to the ranks that asked for it only: with hundreds of ranks, all
    encodings would not fit on a device. Collective.

    Args:
        asked: this rank's prompts, each with its first place in the round: number of the task, and of the sample.
    """
    if group.world.size == 1 or family.encoded is not None:
        return family.encode(list(asked))
    everybody = group.gather(asked)
    prompts = _in_order(everybody)
    passes, ranks = -(-len(prompts) // ENCODED_AT_ONCE), group.world.size
    bounds = [min(passes * rank // ranks * ENCODED_AT_ONCE, len(prompts)) for rank in range(ranks + 1)]
    first, end = bounds[group.world.rank : group.world.rank + 2]
    own = family.encode(prompts[first:end]).tensors if first < end else {}

    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    wanted = [sorted(numbers[prompt] for prompt in theirs) for theirs in everybody]
    leaving = [[number - first for number in theirs if first <= number < end] for theirs in wanted]
    mine = wanted[group.world.rank]
    sent = [len(theirs) for theirs in leaving]
    received = [sum(bounds[rank] <= number < bounds[rank + 1] for number in mine) for rank in range(ranks)]
    picked = torch.tensor([row for theirs in leaving for row in theirs], dtype=torch.long, device=group.device)
    found = {}
    for name, (dtype, shape) in _agreed_shapes(group, own).items():
        tensor = own.get(name, torch.empty(0, *shape, dtype=dtype, device=group.device))
        leaves = _padded(tensor, shape)[picked].flatten(1)
        arrived = group.all_to_all(leaves.view(torch.uint8), sent, received)
        found[name] = arrived.view(dtype).unflatten(1, shape)
    places = {number: row for row, number in enumerate(mine)}
    rows = [places[numbers[prompt]] for prompt in asked]
    return Conditioning(found).select(torch.tensor(rows, device=group.device), rows)


def _in_order(everybody: list[dict[str, tuple[int, int]]]) -> list[str]:
    """All prompts, as a single rank would meet them."""
    places: dict[str, tuple[int, int]] = {}
    for theirs in everybody:
        for prompt, place in theirs.items():
            places[prompt] = min(place, places.get(prompt, place))
    return sorted(places, key=places.__getitem__)


def _agreed_shapes(group: Group, tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """By name, dtype and shape of a row, of the longest on any rank; a rank without a prompt of its own knows none."""
    described = group.gather({name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in tensors.items()})
    known = [one for one in described if one]
    return {
        name: (dtype, tuple(map(max, zip(*(one[name][1] for one in known), strict=True))))
        for name, (dtype, _) in known[0].items()
    }


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows of `shape`, with zeros behind what is there."""
    missing = [longest - here for here, longest in zip(tensor.shape[1:], shape, strict=True)]
    return pad(tensor, [side for size in reversed(missing) for side in (0, size)])
