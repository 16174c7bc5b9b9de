"""Confidence intervals, the normalised average, and paired tests. Every draw is seeded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

RESAMPLES = 2000
FLIPS = 10_000
_BATCH = 100  # resamples or flips held at once


def bootstrap_interval(values: Values, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [n] (Efron 1979), one value per prompt.

    Prompts are what is resampled: several images of one prompt are not independent. One prompt has no interval.
    """
    from scipy.stats import bootstrap  # here: it takes half a second, and runs that evaluate nothing need it not

    if len(values) < 2:
        return float("nan"), float("nan")
    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=_BATCH, confidence_level=level, method="percentile", rng=seed
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def paired_p_value(differences: Values, *, seed: int = 0) -> float:
    """Two-sided paired permutation test (Fisher's sign flips) that the mean of `differences` [n] is 0.

    Under the null a prompt's difference is as likely as its negative. The p value counts the observed arrangement, so
    it is never 0: at least 1 / (FLIPS + 1).
    """
    # scipy's permutation_test is twenty times slower: it permutes where a sign is enough.
    generator = np.random.default_rng(seed)
    observed = abs(differences.sum())
    tolerance = 1e-9 * max(1.0, float(np.abs(differences).sum()))
    extreme = 0
    for _ in range(FLIPS // _BATCH):
        signs = generator.integers(0, 2, (_BATCH, len(differences))) * 2.0 - 1.0
        extreme += int((np.abs(signs @ differences) >= observed - tolerance).sum())
    return (1 + extreme) / (1 + FLIPS)


def holm(p_values: list[float]) -> list[float]:
    """p values adjusted for testing them all (Holm 1979): below alpha means significant at family-wise level alpha."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def normalised_columns(
    table: dict[str, list[float | None]], widths: list[float] | None = None
) -> tuple[list[int], dict[str, list[float]]]:
    """(value - min) / (max - min) per metric, min and max over the compared models.

    A metric that some model lacks, or on which all models are equal, tells nothing about their order and is left out.

    Args:
        table: by model, one value per metric.
        widths: of each metric's uncertainty. Differences below it are not stretched to 0 and 1: they keep their share
            of it, around 0.5.

    Returns:
        The metrics that were kept, and each model's values on them, in [0, 1].
    """
    kept: list[int] = []
    normalised: dict[str, list[float]] = {model: [] for model in table}
    for place, column in enumerate(zip(*table.values(), strict=True)):
        present = [value for value in column if value is not None]
        low, high = min(present, default=0.0), max(present, default=0.0)
        if len(present) < len(column) or high <= low:
            continue
        kept.append(place)
        scale = max(high - low, widths[place] if widths else 0.0)
        for model, value in zip(table, present, strict=True):
            normalised[model].append((1 - (high - low) / scale) / 2 + (value - low) / scale)
    return kept, normalised


def normalised_average(
    table: dict[str, list[float | None]], widths: list[float] | None = None
) -> dict[str, float | None]:
    """The mean of `normalised_columns` (as in DiffusionOPD's tables); None when no metric is kept."""
    _, normalised = normalised_columns(table, widths)
    return {model: float(np.mean(values)) if values else None for model, values in normalised.items()}
