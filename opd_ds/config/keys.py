"""The keys of a config, as its sections define them: for error messages and for the documents about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from opd_ds.config.algorithms import ALGORITHMS
from opd_ds.errors import nearest

# Sections that are one of several algorithms: the key that chooses.
CHOSEN_BY = {"teach": "algorithm", "objective": "method"}


# What other trainers call a key.
_USUAL_NAMES = {
    "learning_rate": "optimizer.lr",
    "lr_scheduler": "optimizer.schedule",
    "batch_size": "train.micro_batch",
    "num_epochs": "run.rounds",
    "guidance_scale": "rollout.guidance",
    "num_inference_steps": "rollout.steps",
}


@dataclass(frozen=True)
class Place:
    """A section and where it stands in a config.

    Attributes:
        key: path to it, with `NAME` for a name of the user's and `[]` for the entries of a list.
        choice: key and value that make it this one of several algorithms; empty where there is no choice.
    """

    key: str
    section: type[BaseModel]
    choice: str = ""


def places(section: type[BaseModel], key: str = "") -> Iterator[Place]:
    """All sections below one, in the order of their keys."""
    for name, field in section.model_fields.items():
        annotation = str(field.annotation)
        below = f"{key}.{name}".strip(".")
        marked = f"{below}.NAME" if "[str, " in annotation else f"{below}[]" if "tuple[" in annotation else below
        for found in sections_of(field.annotation):
            names = [algorithm for algorithm, other in ALGORITHMS.items() if other is found]
            yield Place(marked, found, f"{CHOSEN_BY[below]}: {names[0]}" if names else "")
            yield from places(found, marked)


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation such as `dict[str, TaskSection]` or `NftSection | GuardSection` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in getattr(annotation, "__args__", ()) for section in sections_of(argument)]


def keys_at(kind: type[BaseModel], location: list[str], where: tuple[Any, ...]) -> list[str]:
    """The keys that are valid in the section at `location`; `where` is the same with the names of chosen algorithms."""
    model: type[BaseModel] = kind
    skip = False
    for part in location:
        if skip or part.isdecimal():  # the free name of a task, the place in a list
            skip = False
            continue
        annotation = model.model_fields[part].annotation
        model, *others = sections_of(annotation)
        for other in others:
            if ALGORITHMS.get(str(where[1])) is other:
                model = other
        skip = "[str, " in str(annotation)
    return list(model.model_fields)


def similar_key(kind: type[BaseModel], key: str, here: list[str]) -> str:
    """`' Did you mean ...?'` for an unknown key of a section that has the keys `here`; empty where none is close."""
    name = key.rpartition(".")[2]
    usual = _USUAL_NAMES.get(name, "")
    short = usual.rpartition(".")[2]
    if usual:
        return f" Did you mean {short if short in here else usual!r}?"
    elsewhere = [other for other in all_keys(kind) if not key.startswith(f"{other}.")]
    return nearest(name, here) or nearest(key, elsewhere)


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The keys of a section and of those below it, but for those below a name of the user's."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += all_keys(field.annotation, f"{prefix}{name}.")
    return keys
