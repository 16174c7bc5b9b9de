"""Several teachers in one model, without training: a start for a student, or something to hold it against.

What is merged are deltas, what a teacher adds to the base: scale * B A for a LoRA, W - W_base for a full checkpoint.
Arithmetic is float32, one weight of all teachers at a time.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties
from torch import Tensor

from opd_ds.checkpoint.model_card import CARD, base_name, loading_code, model_card, refuse_occupied
from opd_ds.config.paths import resolve_path
from opd_ds.errors import UserError, about, nearest
from opd_ds.merge.files import (
    Adapter,
    Factors,
    Network,
    Source,
    find_teacher,
    read_teacher,
    refuse_strangers,
    write_loras,
)
from opd_ds.models import ModelFamily, build_family, family_class
from opd_ds.models.inspection import check_base
from opd_ds.utils.hashing import weights_sha256

METHODS = ("linear", "ties", "dare_ties", "dare_linear")


@dataclass(frozen=True)
class Method:
    """How deltas become one; options that a method does not read are refused (UserError).

    Attributes:
        density: share of entries that ties and dare keep, 0.5 by default.
        majority_sign: ties elects signs by sums (`total`, the default) or by counting heads (`frequency`).
        rank: of a merged LoRA; by default the ranks of all sources together.
        seed: names the entries that dare drops.
    """

    name: str = "linear"
    density: float | None = None
    majority_sign: str | None = None
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        density, sign = self.density, self.majority_sign
        if self.name not in METHODS:
            allowed = ", ".join(METHODS)
            raise UserError(f"--method = {self.name!r}: unknown; allowed: {allowed}.{nearest(self.name, METHODS)}")
        if density is not None and self.name == "linear":
            raise UserError(f"--density = {density:g}: --method linear drops nothing; leave it out")
        if density is not None and not 0 < density <= 1:
            raise UserError(f"--density = {density:g}: allowed is the share of entries to keep, above 0 and at most 1")
        if sign is not None and "ties" not in self.name:
            raise UserError(f"--majority-sign = {sign!r}: --method {self.name} elects no signs; leave it out")
        if sign not in (None, "total", "frequency"):
            raise UserError(f"--majority-sign = {sign!r}: unknown; allowed: total, frequency")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank = {self.rank}: allowed: 1 and more")

    def settings(self) -> dict[str, Any]:
        """What decides the result, defaults filled in."""
        settings: dict[str, Any] = {"method": self.name}
        if self.name != "linear":
            settings["density"] = self.density or 0.5
        if "ties" in self.name:
            settings["majority_sign"] = self.majority_sign or "total"
        if "dare" in self.name:
            settings["seed"] = self.seed
        return settings if self.rank is None else settings | {"rank": self.rank}

    def combine(self, deltas: list[Tensor], weights: list[float]) -> Tensor:
        """One delta of several of one shape and dtype. What dare drops is drawn from torch's global CPU generator.

        A weight means the same everywhere: where signs agree and nothing is dropped, the result is
        sum(weight * delta) in every method.
        """
        factors, chosen = torch.tensor(weights, dtype=deltas[0].dtype), self.settings()
        if self.name == "linear":
            return task_arithmetic(deltas, factors)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The density")  # 1 is allowed here, and does nothing
            if self.name == "dare_linear":
                return dare_linear(deltas, factors, chosen["density"])
            # PEFT divides by the number of sources that agree; weights that add up to 1 would divide a second time.
            agree = ties if self.name == "ties" else dare_ties
            return agree(deltas, factors * len(deltas), chosen["density"], chosen["majority_sign"])


def merge(
    out: Path,
    sources: list[Source],
    method: Method,
    *,
    base: str | None = None,
    family: str = "sd3",
    trust_base: bool = False,
) -> float | None:
    """Write `out` with a model card: a LoRA in diffusers' form when all sources are LoRAs, else a diffusers folder in
    float32.

    Args:
        base: the diffusers folder that full checkpoints came from.
        trust_base: accept LoRAs that name other bases.

    Returns:
        What bringing a LoRA to its rank left out, as a share of the merged deltas (Frobenius); None when exact.

    Raises:
        UserError: sources, base and options do not go together; before full checkpoints are read.
    """
    refuse_occupied(out)
    names, weights = [source.name for source in sources], [source.weight for source in sources]
    found = [find_teacher(source) for source in sources]
    full = next((name for name, (_, is_lora) in zip(names, found, strict=True) if not is_lora), None)
    if full is not None and base is None:
        raise UserError(f"--base: needed, as {full!r} is a full checkpoint; give the diffusers folder it came from")
    if full is not None and method.rank is not None:
        raise UserError(f"--rank = {method.rank}: {full!r} is a full checkpoint, the result has no rank; leave it out")
    if full is None and base is not None:
        raise UserError(f"--base = {base!r}: LoRAs are merged to a LoRA, which needs no base; leave it out")
    chosen = family_class(family)
    start, model = (None, None) if base is None else _open_base(base, family)
    teachers = [read_teacher(name, path, chosen, model) for name, (path, _) in zip(names, found, strict=True)]
    adapters = [teacher for teacher in teachers if isinstance(teacher, Adapter)]
    refuse_strangers(names, teachers, base, start, trust_base=trust_base)
    error = None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(method.seed)
        if start is not None and model is not None:
            model.save_full(_merge_full(start, teachers, weights, method), out)
        else:
            base = next((adapter.base for adapter in adapters if adapter.base), None)
            factors, error = _merge_lora(adapters, weights, method)
            write_loras(out, factors, base, chosen)
    rows = [] if start is None else [("base", str(base), weights_sha256(start.path))]
    for source, teacher in zip(sources, teachers, strict=True):
        rows.append((f"teacher, weight {source.weight:g}", source.name, weights_sha256(teacher.path)))
    card = model_card(
        f"{base_name(base or str(out))}, merged from {len(sources)} teachers",
        f"Merged by opd_ds without training: {'lora' if full is None else 'full'} weights.",
        base=base,
        base_folder=start.path if start else None,
        relation="merge",
        tags=["merge"] if full else ["merge", "lora"],
        sources=rows,
        settings=method.settings() | ({} if error is None else {"relative_error": error}),
        code=loading_code(chosen.pipeline_class, base or "BASE", out, "full" if full else "lora", "bfloat16"),
    )
    (out / CARD).write_text(card, encoding="utf-8")
    return error


def _open_base(base: str, family: str) -> tuple[Network, ModelFamily]:
    folder = resolve_path(base, "--base")
    with about(f"--base = {base!r}"):
        check_base(folder, family_class(family))
        model = build_family(family, folder, dtype=torch.float32, device=torch.device("cpu"))
        return Network(folder, model), model


def _merge_full(
    base: Network, teachers: list[Adapter | Network], weights: list[float], method: Method
) -> dict[str, Tensor]:
    merged = {}
    for key in sorted(base.shapes):
        start = base[key]
        merged[key] = start + method.combine([teacher.delta(key, start) for teacher in teachers], weights)
    return merged


def _merge_lora(adapters: list[Adapter], weights: list[float], method: Method) -> tuple[Factors, float | None]:
    """The factors, and what cutting to a rank left out; linear needs no cut, its factors are put side by side."""
    factors: Factors = {}
    exact = method.name == "linear" and method.rank is None
    lost = whole = 0.0
    for key, shape in sorted({key: shape for adapter in adapters for key, shape in adapter.shapes.items()}.items()):
        own = [
            (w, *adapter.factors[key]) for w, adapter in zip(weights, adapters, strict=True) if key in adapter.factors
        ]
        if exact:
            factors[key] = torch.cat([a for _, a, _ in own]), torch.cat([w * b for w, _, b in own], dim=1)
            continue
        zero = torch.zeros(shape)
        delta = method.combine([adapter.delta(key, zero) for adapter in adapters], weights)
        factors[key], values = _low_rank(delta, method.rank or sum(len(a) for _, a, _ in own))
        whole += float(values.square().sum())
        lost += float(values[len(factors[key][0]) :].square().sum())
    return factors, None if exact else (lost / whole) ** 0.5 if whole else 0.0


def _low_rank(delta: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The nearest factors of a delta [out, in, ...], A [r, in, ...] and B [out, r, ...] with r <= rank; and all its
    singular values."""
    u, values, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    # All of the size is in B: where a direction is empty A is not, so a student can still train it.
    a, b = v[:rank], u[:, :rank] * values[:rank]
    return (a.reshape(-1, *delta.shape[1:]), b.reshape(*b.shape, *[1] * (delta.ndim - 2))), values
