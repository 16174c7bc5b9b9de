"""What rewards need, one by one or of all tasks and probes of a run, and what of it is absent. Loads and downloads
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_ds.config.schema import RunConfig
from opd_ds.errors import UserError
from opd_ds.rewards.base import Needs, missing
from opd_ds.rewards.own_file import OwnReward, is_own, load
from opd_ds.rewards.registry import check, needs_of, reward_class


@dataclass(frozen=True)
class RewardNeeds:
    """One reward of a run.

    Attributes:
        asked_by: keys of the tasks and probes that name it.
        extra: of opd-ds, if it needs one.
        weights: published files, with the place where each was found.
        sha256: of a user's own file.
        absent: one line for each thing that is not there, or for what is wrong with its settings or scores.
        note: what a user's own code raised for two blank images, which may be right.
    """

    label: str
    name: str
    asked_by: list[str]
    extra: str | None
    weights: dict[str, str | None]
    sha256: str | None
    absent: list[str]
    note: str = ""


def run_needs(config: RunConfig) -> list[RewardNeeds]:
    """One entry for each reward that a task or a probe of the run names."""
    return [_needs(config, label) for label in config.rewards]


def _needs(config: RunConfig, label: str) -> RewardNeeds:
    section = config.rewards[label]
    asked_by = [
        config.place(name)
        for name, evaluated in config.evaluated.items()
        if label in [reward.label for reward in evaluated.rewards]
    ]
    key = f"{asked_by[0]}.rewards"
    try:
        needs = needs_of(section.name, key, section.options)
        sha256 = load(section.name, key).sha256 if is_own(section.name) else None
    except UserError as error:
        return RewardNeeds(label, section.name, asked_by, None, {}, None, [str(error)])
    absent = [str(problem) for problem in missing(section.name, needs)]
    if not absent:
        try:
            check(section.name, key, section.options)
        except UserError as error:
            absent = [str(error)]
    note = ""
    if not absent:
        absent, note = _tried(section.name, section.options)
    return RewardNeeds(label, section.name, asked_by, needs.extra, _places(needs), sha256, absent, note)


def reward_needs(name: str) -> dict[str, Any]:
    """The same of the reward `name` by itself, without options, as far as these decide nothing."""
    absent, note = _problems(name), ""
    if not absent and is_own(name) and not load(name).required:
        absent, note = _tried(name, {})
    return {"reward": name, "asked_by": [], "absent": absent, "note": note}


def _problems(name: str) -> list[str]:
    """One line for each thing that the reward `name` needs and that is not there, or what is wrong with the name."""
    try:
        return [str(problem) for problem in missing(name, needs_of(name))]
    except UserError as error:
        return [str(error)]


def _tried(name: str, options: Mapping[str, Any]) -> tuple[list[str], str]:
    """What is wrong with the scores of a user's own reward, and a note where two blank images do not tell."""
    try:
        return [], OwnReward(load(name), options).note if is_own(name) else ""
    except UserError as error:
        return [str(error)], ""


def described(name: str) -> dict[str, Any]:
    """What a list says about one reward; imports its module, which imports nothing heavy."""
    try:
        found = reward_class(name)
    except Exception as error:  # a third party's module may raise anything; the others are still listed
        return {"name": name, "judges": f"does not import: {type(error).__name__}: {error}", "installed": False}
    return {
        "name": name,
        "judges": (found.__doc__ or "").strip().partition("\n")[0].partition(". ")[0].rstrip("."),
        "extra": found.needs.extra,
        "installed": not found.needs.absent_packages(),
        "weights": _places(found.needs),
    }


def _places(needs: Needs) -> dict[str, str | None]:
    """By file or folder, where each of the weights was found."""
    places = {weights.file or weights.folder: weights.find() for weights in needs.weights}
    return {file: str(place) if place else None for file, place in places.items()}
