"""Reading published checkpoints strictly: what is absent, damaged or another network is said in one line."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd_ds.errors import UserError
from opd_ds.rewards.base import Needs
from opd_ds.rewards.weights import Weights, WeightsMissingError, WrongWeightsError

State = Mapping[str, Tensor]

# Linear layers of the five-layer heads of LAION's aesthetic predictor and of ImageReward; between them are dropouts.
HEAD_LAYERS = (0, 2, 4, 6, 7)


def precision(reward: str, dtype: str, *allowed: str) -> torch.dtype:
    """The torch dtype called `dtype`.

    Raises:
        UserError: not one of `allowed`, those in which the reward's network is safe.
    """
    if dtype not in allowed:
        raise UserError(f"reward {reward!r}: dtype = {dtype!r}; allowed: {', '.join(allowed)}")
    return getattr(torch, dtype)


def located(published: Weights, own: str | Path | None) -> Path:
    """The user's own file or folder where there is one, else the published one, its hash checked where one is known.

    Raises:
        WeightsMissingError, WrongWeightsError: not there; another hash.
    """
    if own is None:
        return published.require()
    path = Path(own).expanduser()
    if not path.exists():
        expected = published.file or "a transformers folder"
        raise WeightsMissingError(f"{path} does not exist; expected {expected} as published at {published.source}")
    return path


def still_needed(needs: Needs, options: Mapping[str, Any], *names: str) -> Needs:
    """`needs` without the published files that the user's own replace; `names` are their options, in the same order.

    Raises:
        WeightsMissingError: one of the user's own is not there.
    """
    for file, name in zip(needs.weights, names, strict=True):
        if options.get(name) is not None:
            located(file, options[name])
    left = tuple(file for file, name in zip(needs.weights, names, strict=True) if options.get(name) is None)
    return replace(needs, weights=left)


def read_state(path: Path) -> dict[str, Any]:
    """What torch.save wrote to `path`, a dictionary, on the CPU. Only tensors and plain data are unpickled.

    Raises:
        WrongWeightsError: the file is damaged, holds code, or holds no dictionary.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise WrongWeightsError(f"{path} is no PyTorch checkpoint of plain tensors: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise WrongWeightsError(f"{path} holds an object of type {type(found).__name__}, not a dictionary of tensors")
    return found


def from_transformers(kind: type[Any], folder: Path | None, origin: str, **options: Any) -> Any:
    """A transformers model in float32 and evaluation mode, every weight found and none left over.

    Args:
        kind: the model's class.
        folder: in transformers' layout; None when `options` give `config` and `state_dict`.
        origin: what error messages call the weights.

    Raises:
        WrongWeightsError: not such a model; the message names the first missing, unexpected or misshapen key.
    """
    try:
        model, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the key
            dtype=torch.float32,
            **options,
        )
    except Exception as error:  # safetensors, JSON and transformers' checks have no common base
        raise WrongWeightsError(f"{origin} is no {kind.__name__}: {one_line(error)}") from error
    refuse(
        f"{origin} is no {kind.__name__}",
        missing=report["missing_keys"],
        # A constant that old files carry.
        unexpected=[key for key in report["unexpected_keys"] if not key.endswith("position_ids")],
        misshapen=[key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]],
    )
    return model


def refuse(origin: str, **wrong: Iterable[str]) -> None:
    """Raise WrongWeightsError naming the first key of each kind, when there is any."""
    kinds = {kind: sorted(keys) for kind, keys in wrong.items() if keys}
    if kinds:
        said = "; ".join(f"{len(keys)} {kind} keys, the first is {keys[0]}" for kind, keys in kinds.items())
        raise WrongWeightsError(f"{origin}: {said}")


def shape(state: State, key: str, dimensions: int, origin: str) -> tuple[int, ...]:
    """Raises WrongWeightsError when there is no tensor `key` of so many dimensions."""
    value = state.get(key)
    if not isinstance(value, Tensor) or value.ndim != dimensions:
        raise WrongWeightsError(f"{origin}: there is no tensor {key} of {dimensions} dimensions")
    return tuple(value.shape)


def layers(state: State, prefix: str) -> int:
    """Number of consecutive layers `{prefix}{i}.`, counted from the keys."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def linear_head(state: State, width: int, origin: str) -> nn.Sequential:
    """The head of `state` (`layers.{i}.weight`, `layers.{i}.bias`, i in HEAD_LAYERS) on `width` features, in float32.

    It has no activations, as published, and its dropouts do nothing here.

    Raises:
        WrongWeightsError: other keys, or shapes that do not form a chain from `width` to 1.
    """
    named = [f"layers.{i}.{kind}" for i in HEAD_LAYERS for kind in ("weight", "bias")]
    refuse(f"{origin} is no such head", missing=set(named) - set(state), unexpected=set(state) - set(named))
    weights = [state[f"layers.{i}.weight"].float() for i in HEAD_LAYERS]
    biases = [state[f"layers.{i}.bias"].float() for i in HEAD_LAYERS]
    widths = [width, *(len(bias) for bias in biases)]
    if widths[-1] != 1 or [tuple(w.shape) for w in weights] != list(zip(widths[1:], widths[:-1], strict=True)):
        found = " -> ".join(str(tuple(w.shape)) for w in weights)
        raise WrongWeightsError(f"{origin}: weights of shapes {found} do not lead from {width} features to one number")
    head = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0]) for w in weights))
    for layer, weight, bias in zip(head, weights, biases, strict=True):
        layer.load_state_dict({"weight": weight, "bias": bias})
    return head.eval().requires_grad_(False)


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]
