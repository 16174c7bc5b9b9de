"""Rewards by name. A reward's module is imported only when its name is used; third parties register entry points, and
users name files of their own.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from opd_ds.errors import UserError, nearest
from opd_ds.rewards import own_file
from opd_ds.rewards.base import Needs, Reward, Takes, require
from opd_ds.rewards.clips import takes_clips
from opd_ds.rewards.references import takes_references

ENTRY_POINTS = "opd_ds.rewards"

# A new reward is one file with a class, and one line here.
_BUILT_IN = {
    "geneval": "opd_ds.rewards.geneval:GenEval",
    "ocr": "opd_ds.rewards.ocr:OCR",
    "pickscore": "opd_ds.rewards.pickscore:PickScore",
    "clipscore": "opd_ds.rewards.clipscore:ClipScore",
    "clip_direction": "opd_ds.rewards.clip_direction:ClipDirection",
    "dino": "opd_ds.rewards.dino:Dino",
    "lpips": "opd_ds.rewards.lpips:Lpips",
    "hpsv2": "opd_ds.rewards.hpsv2:HPSv2",
    "aesthetic": "opd_ds.rewards.aesthetic:Aesthetic",
    "imagereward": "opd_ds.rewards.imagereward:ImageReward",
    "unifiedreward": "opd_ds.rewards.unifiedreward:UnifiedReward",
    "vlm_judge": "opd_ds.rewards.vlm_judge:VlmJudge",
    "jpeg_compressibility": "opd_ds.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "opd_ds.rewards.jpeg:JpegIncompressibility",
    "mix": "opd_ds.rewards.mix:Mix",
    "remote": "opd_ds.rewards.remote:RemoteReward",
    "miniature_text": "opd_ds.miniature.rewards:TextReward",
    "miniature_composition": "opd_ds.miniature.rewards:CompositionReward",
    "miniature_look": "opd_ds.miniature.rewards:LookReward",
    "miniature_all": "opd_ds.miniature.rewards:AllTasksReward",
    "miniature_edit": "opd_ds.miniature.rewards:EditReward",
}


def _third_party() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in _BUILT_IN}


def reward_names() -> list[str]:
    """Built-in rewards, then those that installed packages register."""
    return [*_BUILT_IN, *_third_party()]


def reward_class(name: str, key: str = "reward") -> type[Reward]:
    """The class behind `name`, its module imported and nothing heavier.

    Raises:
        UserError: unknown name; `key` says where it stood.
    """
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name].split(":")
        return getattr(importlib.import_module(module), attribute)
    third_party = _third_party()
    if name in third_party:
        return third_party[name].load()
    known = reward_names()
    allowed = ", ".join(one for one in known if not one.startswith("miniature_"))
    raise UserError(
        f"{key} = {name!r}: unknown reward; allowed: {allowed}, the miniature's, or FILE.py:NAME.{nearest(name, known)}"
    )


def needs_of(name: str, key: str = "reward", options: Mapping[str, Any] | None = None) -> Needs:
    """What the reward `name` needs with these options.

    A reward whose needs depend on its options offers a `needs_for(options)` class method.
    """
    if own_file.is_own(name):
        return own_file.load(name, key).needs
    found = reward_class(name, key)
    needs_for = getattr(found, "needs_for", None)
    return needs_for(options or {}) if needs_for else found.needs


def takes_of(name: str, key: str = "reward", options: Mapping[str, Any] | None = None) -> Takes:
    """What the reward `name` has to be given with these options.

    A reward that decides it by its options offers a `takes_for(options)` class method.
    """
    found = own_file.load(name, key).found if own_file.is_own(name) else reward_class(name, key)
    takes_for = getattr(found, "takes_for", None)
    return takes_for(options or {}) if takes_for else Takes(takes_clips(found), takes_references(found))


def check(name: str, key: str = "reward", options: Mapping[str, Any] | None = None) -> None:
    """Raise UserError when the reward `name` is unknown, not installed, lacks its weights, or, where `options` are
    given, does not take them. Loads nothing but a user's own file.
    """
    require(name, needs_of(name, key, options))
    if options is not None:
        _check_options(name, options, _signature(name))


def rehearse(name: str, key: str = "reward", options: Mapping[str, Any] | None = None) -> None:
    """`check`, and whatever else a start would refuse that can be found out without loading a network.

    A reward that has more to ask, such as whether its server answers, offers a `rehearse(options)` class method. A
    user's own function is tried; a class of theirs may hold a network, and is tried where a start builds it.
    """
    check(name, key, options or {})
    if own_file.is_own(name):
        if inspect.isfunction(own_file.load(name, key).found):
            build(name, **(options or {}))
        return
    asks = getattr(reward_class(name), "rehearse", None)
    if asks is not None:
        asks(options or {})


def build(name: str, device: str | None = None, **options: Any) -> Reward:
    """The reward `name`, its weights loaded.

    Args:
        device: where its network runs; passed on to rewards that have one, their default is the CPU.
        options: the reward's own, such as `batch_size`; see its class.

    Raises:
        UserError: unknown name or option, a required option that is not given, absent packages or weights, a file of
            the user's own that does not run.
    """
    check(name, options=options)
    if device is not None and "device" in _signature(name).parameters:
        options["device"] = device
    if own_file.is_own(name):
        return own_file.OwnReward(own_file.load(name), options)
    return reward_class(name)(**options)


def _signature(name: str) -> inspect.Signature:
    """The options that a reward takes."""
    return own_file.load(name).signature if own_file.is_own(name) else inspect.signature(reward_class(name))


def _check_options(name: str, options: Mapping[str, Any], signature: inspect.Signature) -> None:
    known = sorted(signature.parameters)
    for option in options.keys() - set(known):
        raise UserError(
            f"reward {name!r}: unknown option {option!r}; allowed: {', '.join(known) or 'none'}."
            f"{nearest(option, known)}"
        )
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UserError(f"reward {name!r}: {error}; its options: {', '.join(known)}") from error
