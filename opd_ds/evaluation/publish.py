"""The end of every evaluation, a run's own as well as `opd-ds eval`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opd_ds.engine import Group
from opd_ds.evaluation.benchmark import Benchmark, EvalModel
from opd_ds.evaluation.report import write_report
from opd_ds.evaluation.results import Results, collect, write_results


def publish(
    benchmark: Benchmark,
    models: list[EvalModel],
    group: Group,
    metrics: list[dict[str, Any]],
    pause: Callable[[], None] | None = None,
) -> Results:
    """Draw and score what is missing; write results.json, its tables and report.html. Collective.

    Args:
        metrics: the rows of the run's metrics.jsonl, for the training curves.
        pause: as for `Benchmark.draw`.
    """
    for model in models:
        benchmark.draw(model, pause)
    results = collect(benchmark, models, benchmark.score(models))
    if group.world.is_main:
        write_results(benchmark.folder, results)
        write_report(benchmark.folder, results, metrics)
    group.barrier()
    return results
