"""results.json: what an evaluation found, as plain data, and the tables made of it."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from opd_ds.config.sections import WEIGHTED_SUM
from opd_ds.errors import IncompleteError, UserError
from opd_ds.evaluation.benchmark import Benchmark, EvalModel, Scores
from opd_ds.evaluation.evaluator import Means
from opd_ds.evaluation.statistics import bootstrap_interval, normalised_average
from opd_ds.utils.markdown import markdown_table
from opd_ds.utils.tables import fitting

RESULTS_FILE = "results.json"
FORMAT = 1

Results = dict[str, Any]


def outline(benchmark: Benchmark, models: list[EvalModel]) -> Results:
    """What is asked: settings, models, rewards and sets, under the keys of results.json."""
    sets: dict[str, dict[str, Any]] = {
        name: {
            "sha256": chosen.prompts.sha256,
            "prompts": [item.prompt for item in chosen.items if item.sample == 0],
            "samples": 1 + max((item.sample for item in chosen.items), default=0),
            "rewards": [*chosen.headlines, *chosen.asked],
            "own": [*chosen.headlines, *chosen.own],
            "summed": dict(chosen.summed),
        }
        for name, chosen in benchmark.sets.items()
    }
    return {
        "format": FORMAT,
        "settings": benchmark.settings,
        "models": {
            model.name: {"identity": model.identity, "guidance": model.guidance, "folder": model.folder}
            for model in models
        },
        "rewards": benchmark.identities,
        "sets": sets,
    }


def not_kept(old: Results, new: Results) -> str:
    """The first thing of the evaluation `old` that is not in `new` as well, given its outline; empty where all is."""
    for key, value in old["settings"].items():
        if new["settings"].get(key) != value:
            return f"setting {key} = {value!r}"
    for name, model in old["models"].items():
        if name not in new["models"] or any(new["models"][name][key] != model[key] for key in ("identity", "folder")):
            return f"model {name} with other weights" if name in new["models"] else f"model {name}"
        for chosen, guidance in model["guidance"].items():
            if new["models"][name]["guidance"].get(chosen) != guidance:
                return f"model {name} with guidance {guidance:g} on {chosen}"
    for name, chosen in old["sets"].items():
        if name not in new["sets"]:
            return f"prompt set {name}"
        ours = new["sets"][name]
        if ours["prompts"][: len(chosen["prompts"])] != chosen["prompts"] or ours["samples"] < chosen["samples"]:
            return f"prompt set {name} with {len(chosen['prompts'])} prompts of {chosen['samples']} samples"
        for label in chosen["rewards"]:
            if label not in ours["rewards"] or measure(old, name, label) != measure(new, name, label):
                return f"reward {label} on {name}"
    return ""


def measure(results: Results, name: str, label: str) -> list[Any]:
    """What decides a score: the reward's identity; for a weighted sum those of its parts, and the weights."""
    summed = results["sets"][name].get("summed", {}) if label == WEIGHTED_SUM else {label: 1.0}
    return [[part, weight, results["rewards"][part]] for part, weight in sorted(summed.items())]


def collect(benchmark: Benchmark, models: list[EvalModel], scores: Scores) -> Results:
    """All that results.json holds; see docs/evaluation.md for its keys. What does not exist is None."""
    results = outline(benchmark, models)
    sets = results["sets"]
    table = {
        model.name: {
            name: {
                label: _entry(scores[model.name, name, label], len(chosen["prompts"])) for label in chosen["rewards"]
            }
            for name, chosen in sets.items()
        }
        for model in models
    }
    results["scores"] = table
    results["metrics"] = [list(metric) for metric in own_metrics(results)]
    averaged = averaged_metrics(results)
    results["normalised_average"] = normalised_average(means_of(results, averaged), interval_widths(results, averaged))
    return results


def own_metrics(results: Results) -> list[tuple[str, str]]:
    """(prompt set, label) for each set's own rewards: the columns of tables."""
    return [(name, label) for name, chosen in results["sets"].items() for label in chosen["own"]]


def averaged_metrics(results: Results) -> list[tuple[str, str]]:
    """Those of the normalised average: weighted sums are left out, whose parts are there."""
    return [metric for metric in own_metrics(results) if metric[1] != WEIGHTED_SUM]


def means_of(results: Results, metrics: list[tuple[str, str]]) -> dict[str, list[float | None]]:
    """By model, one mean per metric."""
    return {
        model: [by_set[name][label]["mean"] for name, label in metrics] for model, by_set in results["scores"].items()
    }


def interval_widths(results: Results, metrics: list[tuple[str, str]]) -> list[float]:
    """Of each metric, half the widest 95 % interval of all models; 0 where there is none."""
    halves = []
    for name, label in metrics:
        intervals = [by_set[name][label]["ci95"] for by_set in results["scores"].values()]
        halves.append(max(((high - low) / 2 for low, high in intervals if low is not None), default=0.0))
    return halves


def _entry(scores: list[float], prompts: int) -> dict[str, Any]:
    """Statistics of one model, set and reward; `scores` holds all first images, then all second ones, and so on."""
    pictures = np.asarray(scores, dtype=np.float64).reshape(-1, prompts).T
    scored = np.isfinite(pictures)
    counts = scored.sum(1)
    means = np.where(counts > 0, np.where(scored, pictures, 0.0).sum(1) / np.maximum(counts, 1), math.nan)
    present = means[counts > 0]
    low, high = bootstrap_interval(present)
    return {
        "n": int(scored.sum()),
        "nan": int((~scored).sum()),
        "mean": _plain(present.mean() if len(present) else math.nan),
        "ci95": [_plain(low), _plain(high)],
        "per_prompt": [_plain(value) for value in means],
        "per_picture": [[_plain(value) for value in row] for row in pictures],
    }


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def require_scores(results: Results) -> None:
    """Raise IncompleteError when a reward that was asked has scored none of the images."""
    scored: dict[str, int] = {}
    for by_set in results["scores"].values():
        for labels in by_set.values():
            for label, entry in labels.items():
                scored[label] = scored.get(label, 0) + entry["n"]
    without = [label for label, count in scored.items() if not count and label != WEIGHTED_SUM]
    if without:
        raise IncompleteError(
            f"no image has a score by {', '.join(without)}, the log says why; all else is done and written. "
            "Once that is mended, `opd-ds eval` scores the same images"
        )


def means(results: Results) -> dict[str, Means]:
    """By model, prompt set and label; absent is NaN."""
    return {
        model: {
            name: {label: math.nan if entry["mean"] is None else entry["mean"] for label, entry in labels.items()}
            for name, labels in by_set.items()
        }
        for model, by_set in results["scores"].items()
    }


def write_results(folder: Path, results: Results) -> None:
    """results.json; where there are rewards, results.md and results.csv as well."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {RESULTS_FILE: json.dumps(results, indent=1, allow_nan=False) + "\n"}
    tables = {"results.md": as_markdown(results), "results.csv": as_csv(results)}
    if own_metrics(results):
        texts |= tables
    else:
        for name in tables:
            (folder / name).unlink(missing_ok=True)
    for name, text in texts.items():
        draft = folder / f".{name}.writing"
        draft.write_text(text, encoding="utf-8")
        draft.replace(folder / name)


def read_results(file: Path) -> Results:
    """Raises UserError when there is none or it is not one of ours."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; `opd-ds eval` writes <run.output_dir>/eval/{RESULTS_FILE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON ({error}); give a results.json of `opd-ds eval`") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{file}: not a results file of `opd-ds eval` in format {FORMAT}")
    return data


def as_summary(results: Results, folder: Path) -> dict[str, Any]:
    """For programs: where everything is, and the results without those of single prompts."""
    scores = {
        model: {
            name: {label: {key: entry[key] for key in ("n", "nan", "mean", "ci95")} for label, entry in labels.items()}
            for name, labels in by_set.items()
        }
        for model, by_set in results["scores"].items()
    }
    return {
        "folder": str(folder),
        "results": str(folder / RESULTS_FILE),
        "metrics": results["metrics"],
        "scores": scores,
        "normalised_average": results["normalised_average"],
    }


# ---- tables ----


def _rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Models by own metrics, with half the width of the interval, and the normalised average."""
    metrics = own_metrics(results)
    rows = []
    for model, by_set in results["scores"].items():
        cells = [_cell(by_set[name][label]) for name, label in metrics]
        average = results["normalised_average"][model]
        rows.append([model, *cells, "-" if average is None else f"{average:.3f}"])
    return ["model", *(metric_title(*metric) for metric in metrics), "average"], rows


def metric_title(name: str, label: str) -> str:
    """`set / label`, or one of them when it holds the other."""
    return label if name in label else f"{name} / {label}"


def _cell(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        return "-"
    low, high = entry["ci95"]
    return f"{entry['mean']:.3f}" + (f" ±{(high - low) / 2:.3f}" if low is not None else "")


def print_results(console: Console, results: Results) -> None:
    """The terminal's table; a line where there are no rewards."""
    if not own_metrics(results):
        console.print("no rewards: images without scores")
        return
    head, rows = _rows(results)
    console.print("mean reward ± half the 95 % bootstrap interval; average: see docs/evaluation.md")
    for table in fitting(head, rows, console.width):
        console.print(table)


def as_markdown(results: Results) -> str:
    """The same, for a README."""
    head, rows = _rows(results)
    return markdown_table(head, rows)


def as_csv(results: Results) -> str:
    """One line per model, prompt set and reward, own or not."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "set", "reward", "own", "n", "nan", "mean", "ci95_low", "ci95_high"])
    own = set(own_metrics(results))
    for model, by_set in results["scores"].items():
        for name, labels in by_set.items():
            for label, entry in labels.items():
                numbers = [entry["n"], entry["nan"], entry["mean"], *entry["ci95"]]
                writer.writerow([model, name, label, int((name, label) in own), *numbers])
    return text.getvalue()
