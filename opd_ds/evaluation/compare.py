"""`opd-ds eval --compare`: which differences between two evaluations are more than chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from opd_ds.errors import UserError
from opd_ds.evaluation.results import Results, measure, metric_title, read_results
from opd_ds.evaluation.statistics import Values, bootstrap_interval, holm, paired_p_value

ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """The second file's model minus the first's on one metric, over `n` shared prompts.

    `interval` is a 95 % bootstrap interval of the mean difference; `p` comes from a paired permutation test and
    `adjusted` is `p` after Holm's correction over all differences of the comparison.
    """

    models: tuple[str, str]
    prompt_set: str
    reward: str
    n: int
    mean: float
    interval: tuple[float, float]
    p: float
    adjusted: float

    @property
    def significant(self) -> bool:
        return self.adjusted < ALPHA


def compare_files(first: str, second: str) -> tuple[list[Difference], list[str]]:
    """Compare `file[#model]` with `file[#model]`: differences, and what was left out, as notes.

    Raises:
        UserError: no such file or model, or nothing that both measured.
    """
    (file_a, model_a), (file_b, model_b) = (_split(text) for text in (first, second))
    a, b = read_results(Path(file_a)), read_results(Path(file_b))
    return compare(a, b, _pairs(a, b, model_a, model_b))


def compare(a: Results, b: Results, pairs: list[tuple[str, str]]) -> tuple[list[Difference], list[str]]:
    """All metrics of all `pairs` of models that both files have; and what was left out, as notes."""
    notes = [
        f"setting {key}: {a['settings'].get(key)!r} and {b['settings'].get(key)!r}"
        for key in sorted(a["settings"].keys() | b["settings"].keys())
        if a["settings"].get(key) != b["settings"].get(key)
    ]
    same_settings = not notes
    rows = []
    for (model_a, model_b), (name, label) in product(pairs, _shared_metrics(a, b)):
        if same_settings and a["models"][model_a]["identity"] == b["models"][model_b]["identity"]:
            notes.append(f"{model_a} and {model_b} are the same weights: not compared")
            continue
        if measure(a, name, label) != measure(b, name, label):
            notes.append(f"{name} / {label}: measured by two different rewards: not compared")
            continue
        difference = _paired(a, b, model_a, model_b, name, label)
        if len(difference) < 2:
            notes.append(f"{name} / {label}: {len(difference)} shared prompts: not compared")
            continue
        rows.append(((model_a, model_b), name, label, difference, paired_p_value(difference)))
    adjusted = holm([row[-1] for row in rows])
    return [
        Difference(models, name, label, len(values), float(values.mean()), bootstrap_interval(values), p, corrected)
        for (models, name, label, values, p), corrected in zip(rows, adjusted, strict=True)
    ], list(dict.fromkeys(notes))


def _split(text: str) -> tuple[str, str | None]:
    file, separator, model = text.rpartition("#")
    return (file, model) if separator else (text, None)


def _pairs(a: Results, b: Results, model_a: str | None, model_b: str | None) -> list[tuple[str, str]]:
    """The named models, or all that both files have."""
    if model_a is None and model_b is None:
        shared = [(name, name) for name in a["models"] if name in b["models"]]
        if not shared:
            raise UserError("--compare: the files share no model; name one in each, for example a/results.json#student")
        return shared
    chosen = (model_a or str(model_b), model_b or str(model_a))
    for name, results in zip(chosen, (a, b), strict=True):
        if name not in results["models"]:
            raise UserError(f"--compare: no model {name!r}; there are {', '.join(results['models'])}")
    return [chosen]


def _shared_metrics(a: Results, b: Results) -> Iterator[tuple[str, str]]:
    for name, chosen in a["sets"].items():
        for label in chosen["rewards"]:
            if label in b["sets"].get(name, {}).get("rewards", []):
                yield name, label


def _paired(a: Results, b: Results, model_a: str, model_b: str, name: str, label: str) -> Values:
    """Second minus first, over the prompts that both have a score for; a text that comes twice is paired in order."""
    first, second = _by_prompt(a, model_a, name, label), _by_prompt(b, model_b, name, label)
    return np.array([second[prompt] - first[prompt] for prompt in first if prompt in second], dtype=np.float64)


def _by_prompt(results: Results, model: str, name: str, label: str) -> dict[tuple[str, int], float]:
    seen: Counter[str] = Counter()
    scores = {}
    entry = results["scores"][model][name][label]
    for prompt, score in zip(results["sets"][name]["prompts"], entry["per_prompt"], strict=True):
        if score is not None:
            scores[prompt, seen[prompt]] = score
        seen[prompt] += 1
    return scores


def as_dict(differences: list[Difference], notes: list[str]) -> dict[str, Any]:
    """For programs."""
    return {"differences": [asdict(one) | {"significant": one.significant} for one in differences], "notes": notes}


def print_differences(differences: list[Difference], notes: list[str]) -> None:
    """For people: names are folded where the terminal is narrow, numbers are not."""
    console = Console(soft_wrap=True)
    console.print("second minus first, over shared prompts; paired permutation test")
    console.print("(Holm: corrected for all rows; *: below 0.05)")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(("models", "metric", "n", "difference", "95 % interval", "p", "p (Holm)")):
        table.add_column(name, justify="left" if column < 2 else "right", no_wrap=column >= 2, overflow="fold")
    for row in differences:
        models = row.models[0] if row.models[0] == row.models[1] else f"{row.models[0]} → {row.models[1]}"
        low, high = row.interval
        adjusted = f"{row.adjusted:.4f}{'*' if row.significant else ' '}"
        cells = [f"{row.mean:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{row.p:.4f}", adjusted]
        table.add_row(models, metric_title(row.prompt_set, row.reward), str(row.n), *cells)
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)
