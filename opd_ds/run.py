"""A run from start to end: resume, rounds, checkpoints, evaluation, export."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from opd_ds.checkpoint import CHECKPOINTS_FOLDER, CheckpointStore, read_state, refuse_other_run
from opd_ds.config import RunConfig
from opd_ds.engine import Group, StudentEngine, ema_file
from opd_ds.errors import Interrupted, UserError
from opd_ds.evaluation.benchmark import Benchmark, Contestant
from opd_ds.evaluation.evaluator import Means, Shown, student_guidance
from opd_ds.evaluation.publish import publish
from opd_ds.evaluation.report import REPORT_FILE
from opd_ds.evaluation.results import means
from opd_ds.evaluation.tables import comparison_grid, print_table, summary
from opd_ds.export import EXPORT_FOLDER, export_student
from opd_ds.hashing import file_sha256
from opd_ds.monitor import METRICS_FILE, Monitor, read_metrics
from opd_ds.preparation import Parts, prepare
from opd_ds.trainer import RoundReport
from opd_ds.watch import Watch


def train(config: RunConfig, group: Group, resume: str = "never") -> None:
    """The whole run. Collective.

    Args:
        resume: `never` (refuses an output folder with checkpoints), `auto` (the newest checkpoint, or a fresh start),
            or the path of one checkpoint.

    Raises:
        UserError: something the user can fix, before the first round.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
        NonFiniteError: loss or gradient norm is not finite; the last checkpoint is intact.
    """
    stop = _StopSignal()
    store = CheckpointStore(config.run.output_dir / CHECKPOINTS_FOLDER, config.run.keep_checkpoints, group)
    with group.agreed():
        checkpoint = _find_checkpoint(store, resume)
    parts = prepare(config, group)
    start = _restore(parts, checkpoint, group) if checkpoint else 0
    with Monitor(config, group.world, start) as monitor:
        if checkpoint:
            monitor.say(f"resumed from {checkpoint}, {start} rounds done")
        monitor.identities(parts.benchmark.identities)
        baselines = _baselines(config, parts, monitor, fresh=checkpoint is None)
        watch = (
            Watch(config, parts.rewards, parts.family.decode) if config.watch.every and group.world.is_main else None
        )
        for index in range(start, config.run.rounds):
            report = parts.trainer.run_round(index)
            monitor.round(report)
            done = index + 1
            stopping = stop.agreed(group)
            if stopping or done % config.run.checkpoint_every == 0 or done == config.run.rounds:
                saved = _save(parts, store, done, group)
                if stopping and done < config.run.rounds:
                    monitor.say(f"interrupted after round {done}; state saved in {saved}; go on with --resume auto")
                    raise Interrupted(0)
            _show_student(config, parts, report, watch, monitor)
        if watch is not None:
            monitor.looks(watch.close())
        _finish(config, parts, baselines, group, monitor)


class _StopSignal:
    """SIGTERM and SIGINT ask for a stop after the round; a second one ends the process at once, as usual."""

    def __init__(self) -> None:
        self._received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        signal.signal(number, signal.SIG_DFL)

    def agreed(self, group: Group) -> bool:
        """Whether any rank was asked to stop; all ranks get the same answer. Collective."""
        return bool(group.sum(torch.tensor([float(self._received)])).item())


# ---- checkpoints ----


def _find_checkpoint(store: CheckpointStore, resume: str) -> Path | None:
    if resume == "auto":
        return store.latest()
    if resume != "never":
        read_state(Path(resume))
        return Path(resume)
    if store.latest() is not None:
        raise UserError(
            f"run.output_dir already holds {store.latest()}; give --resume auto to go on, or another run.output_dir"
        )
    return None


def _save(parts: Parts, store: CheckpointStore, done: int, group: Group) -> Path:
    state = {
        "round": done,
        "world_size": group.world.size,
        "zero_stage": parts.student.zero_stage,
        "run": parts.identity,
    }

    def write(folder: Path) -> None:
        parts.student.save(folder)
        if parts.ema is not None:
            parts.ema.save(folder / ema_file(group.world.rank))

    return store.save(done, state, write)


def _restore(parts: Parts, checkpoint: Path, group: Group) -> int:
    """Load `checkpoint`; returns the rounds it had done."""
    with group.agreed():
        state = read_state(checkpoint)
        refuse_other_run(state["run"], parts.identity, checkpoint)
        for key, current in (("world_size", group.world.size), ("zero_stage", parts.student.zero_stage)):
            if state[key] != current:
                raise UserError(
                    f"resume from {checkpoint.name}: it was written with {key} = {state[key]}, now {current}"
                )
    parts.student.load(checkpoint)
    if parts.ema is not None:
        parts.ema.load(checkpoint / ema_file(group.world.rank))
    return int(state["round"])


# ---- evaluation ----


def _baselines(config: RunConfig, parts: Parts, monitor: Monitor, *, fresh: bool) -> list[Contestant]:
    """Base and teachers, their pictures drawn. At the start of a run the student still is the base."""
    benchmark, tasks = parts.benchmark, parts.identity["tasks"]
    if not config.evaluation.baselines or not benchmark.sets:
        return []
    guidance = student_guidance(config, list(benchmark.sets))
    base = Contestant("base", parts.identity["base"]["sha256"], guidance, partial(nullcontext, parts.student))
    teachers = [
        Contestant(
            f"teacher:{task}",
            tasks[task]["teacher_sha256"],
            dict.fromkeys(benchmark.sets, parts.teachers.guidance(task)),
            partial(parts.teachers.active, task),
        )
        for task in config.tasks
    ]
    monitor.say("drawing base and teachers on the held-out prompts")
    if not fresh and benchmark.missing(base):
        monitor.say("the base's pictures of the first start are not there: the final table will lack it")
        models = teachers
    else:
        models = [base, *teachers]
    for model in models:
        benchmark.draw(model)
    return models


@contextmanager
def _final_student(parts: Parts) -> Iterator[StudentEngine]:
    """The averaged student where an EMA is kept."""
    with parts.ema.swapped_in() if parts.ema is not None else nullcontext():
        yield parts.student


def _show_student(config: RunConfig, parts: Parts, report: RoundReport, watch: Watch | None, monitor: Monitor) -> None:
    """Scores, looks and image grids while the run goes on. Collective: `watch` lives on rank 0, the drawing on all."""
    done, evaluator = report.round, parts.evaluator

    def due(every: int) -> bool:
        return every > 0 and done % every == 0

    if watch is not None:
        monitor.looks(watch.finished())
    score_now = due(config.run.eval_every) and done < config.run.rounds
    show_now = due(config.run.image_every) and done < config.run.rounds
    held_out: dict[str, list[Shown]] = {}
    guidance = student_guidance(config, evaluator.tasks)
    if score_now or show_now or (due(config.watch.every) and config.watch.held_out):
        with _final_student(parts) as network:
            if due(config.watch.every) and config.watch.held_out:
                held_out = evaluator.look(network, guidance, config.watch.held_out)
            if score_now:
                result = evaluator.run(network, guidance)
                monitor.scores(done, result.scores)
            if score_now or show_now:
                shown = result.shown if score_now else evaluator.look(network, guidance, config.evaluation.grid_prompts)
                pictures = {task: [image for _, image in pairs] for task, pairs in shown.items()}
                prompts = {task: [item.prompt for item, _ in pairs] for task, pairs in shown.items()}
                monitor.picture("student", comparison_grid({"student": pictures}, prompts), done)
    if watch is not None and due(config.watch.every):
        watch.submit(done, report.rolled, held_out)


def _finish(config: RunConfig, parts: Parts, baselines: list[Contestant], group: Group, monitor: Monitor) -> None:
    """Export, final scores, table, picture and report."""
    folder, benchmark = config.run.output_dir, parts.benchmark
    with _final_student(parts) as student:
        export_student(student, parts.family, config.student.kind, folder / EXPORT_FOLDER, group)
    scores: dict[str, Means] = {}
    if benchmark.sets:
        identity = group.gather(file_sha256(folder / EXPORT_FOLDER) if group.world.is_main else None)[0]
        guidance = student_guidance(config, list(benchmark.sets))
        models = [*baselines, Contestant("student", identity, guidance, partial(_final_student, parts))]
        scores = _evaluate(config, benchmark, models, group, monitor)
    if group.world.is_main:
        data: dict[str, Any] = summary(scores, {name: task.headline for name, task in config.tasks.items()})
        (folder / "summary.json").write_text(json.dumps(data, indent=1) + "\n")
        monitor.say("")
        if scores:
            print_table(monitor.console, data)
    if benchmark.sets:
        monitor.say(f"pictures:     {folder / 'grid.png'}")
        monitor.say(f"report:       {benchmark.folder / REPORT_FILE}")
    monitor.say(f"TensorBoard:  tensorboard --logdir {folder / 'tensorboard'}")
    monitor.say(f"scores:       {folder / 'summary.json'}")
    monitor.say(f"model:        {folder / EXPORT_FOLDER}")


def _evaluate(
    config: RunConfig, benchmark: Benchmark, models: list[Contestant], group: Group, monitor: Monitor
) -> dict[str, Means]:
    """The final evaluation, as `opd-ds eval` makes it; mean rewards by model."""
    results = publish(benchmark, models, group, read_metrics(config.run.output_dir / METRICS_FILE))
    scores = means(results)
    monitor.scores(config.run.rounds, scores["student"])
    if group.world.is_main:
        count = config.evaluation.grid_prompts
        pictures = {model.name: benchmark.first_pictures(model, count) for model in models}
        prompts = {name: chosen["prompts"] for name, chosen in results["sets"].items()}
        grid = comparison_grid(pictures, prompts)
        if grid is not None:
            monitor.picture("models", grid, config.run.rounds)
            grid.save(config.run.output_dir / "grid.png")
    return scores
