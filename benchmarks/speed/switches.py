"""Each optimisation by itself: a setting of the run config, off and on, all else equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.sizes import SETTINGS, Setting

_LORA, _FULL, _ = SETTINGS
# Sections of the run config by samples per task and device.
Sections = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Switch:
    """`off` and `on` give what differs from the bench's config."""

    name: str
    what: str
    off: Sections
    on: Sections
    setting: Setting = _LORA
    ranks: int = 1


def _rollout(**values: Any) -> Sections:
    return lambda samples: {"rollout": values}


def _as_it_is(samples: int) -> dict[str, Any]:
    return {}


def _sharded(gather: str) -> Sections:
    return lambda samples: {"deepspeed": "miniature", "rollout": {"gather": gather}}


SWITCHES = (
    Switch(
        "rollout-together",
        "rollout: all tasks in one forward, instead of task by task",
        lambda samples: {"rollout": {"micro_batch": samples}},
        _as_it_is,
    ),
    Switch(
        "scoring-batched",
        "scoring: all steps and samples of a task in one forward, instead of step by step",
        lambda samples: {"scoring": {"micro_batch": samples}},
        _as_it_is,
    ),
    Switch(
        "training-batched",
        "training: all steps and samples of a task in one backward, instead of step by step",
        lambda samples: {"train": {"micro_batch": samples}, "scoring": {"micro_batch": 9 * samples}},
        _as_it_is,
    ),
    Switch("fused", "fused instead of buffered", _rollout(mode="buffered"), _rollout(mode="fused")),
    Switch(
        "fused-together",
        "fused: all tasks in one forward and backward, instead of task by task",
        lambda samples: {"rollout": {"mode": "fused", "micro_batch": samples}},
        _rollout(mode="fused"),
    ),
    Switch(
        "compiled",
        "torch.compile of the blocks, instead of none",
        lambda samples: {"model": {"compile_blocks": False}},
        lambda samples: {"model": {"compile_blocks": True}},
        _FULL,
    ),
    Switch(
        "gathered-once",
        "rollout under ZeRO-3: weights gathered once, instead of layer by layer; one rank",
        _sharded("per_layer"),
        _sharded("once"),
        _FULL,
    ),
    Switch(
        "gathered-once-2",
        "the same, two ranks",
        _sharded("per_layer"),
        _sharded("once"),
        _FULL,
        ranks=2,
    ),
)
