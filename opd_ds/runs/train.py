"""A run from start to end: resume, rounds, checkpoints, evaluation, export."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from opd_ds.checkpoint.export_student import EXPORT_FOLDER, STUDENT_ADAPTER, export_student
from opd_ds.checkpoint.store import CHECKPOINTS_FOLDER, CheckpointStore
from opd_ds.cluster.signals import StopRequest, ignore_signals, listen
from opd_ds.cluster.world import JOB_VARIABLE
from opd_ds.config.schema import RunConfig
from opd_ds.engine import Group, ShardReader, StudentEngine
from opd_ds.errors import Interrupted
from opd_ds.evaluation.benchmark import Benchmark, EvalModel
from opd_ds.evaluation.clips import animation, frames_of
from opd_ds.evaluation.evaluator import Means, Shown, student_guidance
from opd_ds.evaluation.pictures import references
from opd_ds.evaluation.publish import publish
from opd_ds.evaluation.report import REPORT_FILE
from opd_ds.evaluation.results import Results, interval_widths, means, require_scores
from opd_ds.evaluation.tables import comparison_grid, print_table, summary
from opd_ds.models import CompilationLog, lora
from opd_ds.runs.monitor import METRICS_FILE, Monitor, read_metrics
from opd_ds.runs.output_lock import PATIENCE, OutputLock
from opd_ds.runs.pass_summary import as_lines, pass_summary, tracked
from opd_ds.runs.profiling import maybe_profiled
from opd_ds.runs.resume import ResumePoint, Start
from opd_ds.runs.reward_eval import AsyncRewardEval
from opd_ds.runs.rollout_mode import ENTRY as MODE_ENTRY
from opd_ds.runs.setup import Parts, prepare, prepare_server
from opd_ds.runs.trackers import places
from opd_ds.training.trainer import RoundReport
from opd_ds.utils.hashing import weights_sha256


def train(
    config: RunConfig,
    group: Group,
    resume: str = "never",
    allowed: Sequence[str] = (),
    callbacks: Sequence[Callable[[RoundReport], None]] = (),
) -> None:
    """The whole run. Collective.

    Args:
        resume, allowed: as in `Start`.
        callbacks: called on every rank with what each round measured.

    Raises:
        UserError: something the user can fix, before the first round.
        Interrupted: a signal asked for it; the state is saved.
        NonFiniteError: loss or gradient norm is not finite; the last checkpoint is intact.
        IncompleteError: at the very end, when a reward has scored none of the final images.
    """
    stop = listen()
    settings = config.run
    if group.roles.is_teacher:
        _serve(config, group, Start(resume, tuple(allowed)))
        return
    store = CheckpointStore(
        settings.output_dir / CHECKPOINTS_FOLDER,
        settings.keep_checkpoints,
        group,
        in_background=settings.checkpoint_in_background,
    )
    group.watch_hangs(settings.hang_minutes, settings.output_dir)
    group.progress("loading models")
    with OutputLock(0.0 if resume == "never" else PATIENCE) as lock:
        parts = prepare(config, group, Start(resume, tuple(allowed), lock.take))
        try:
            _run(parts, store, stop, group, callbacks)
        except Interrupted as interruption:
            parts.teachers.end(interruption.code)
            raise
        parts.teachers.end()


def _serve(config: RunConfig, group: Group, start: Start) -> None:
    """A rank that holds teachers, until the others are through."""
    group.watch_hangs(config.run.hang_minutes, config.run.output_dir)
    group.progress("loading teachers")
    code = prepare_server(config, group, start).serve()
    if code is not None:
        ignore_signals()
        raise Interrupted(code)


def _run(
    parts: Parts,
    store: CheckpointStore,
    stop: StopRequest,
    group: Group,
    callbacks: Sequence[Callable[[RoundReport], None]],
) -> None:
    config, resumed, start = parts.config, parts.resumed, 0
    settings = config.run
    if resumed is not None:
        group.progress("restoring the checkpoint")
        _restore(parts, resumed, group)
        start = resumed.done
        # Only once it is certain that the run resumes from there.
        store.go_back_to(resumed.checkpoint, start, resumed.damaged)
    with Monitor(config, group.world, start, parts.benchmark.identities) as monitor:
        monitor.tell(f"resumed from {resumed.checkpoint}, {start} rounds done" if resumed else "starting with round 1")
        session = _Session(parts, store, monitor, stop, group, saved=start)
        baselines = _baselines(config, parts, session, fresh=resumed is None)
        watch = AsyncRewardEval(config, parts.rewards) if config.watch.every and group.world.is_main else None
        monitor.start_rounds(start)
        compilation = CompilationLog()
        for index in range(start, settings.rounds):
            session.stop_if_asked(index)
            report = maybe_profiled(parts.trainer.run_round, index, settings.profile, settings.output_dir, group)
            if config.model.compile_blocks and group.world.is_main:
                compilation.after_round(parts.student.module, index + 1)
            if index == start and group.world.is_main:
                _say_what_teaches_nothing(config, report)
            monitor.round(report)
            for callback in callbacks:
                callback(report)
            done = index + 1
            if done % settings.checkpoint_every == 0 or done == settings.rounds:
                session.save(done)
            store.publish_if_written()
            _show_student(config, parts, report, watch, monitor)
        store.finish()
        if watch is not None:
            monitor.rewards(watch.close(partial(group.progress, "waiting for the rewards")))
        _finish(config, parts, baselines, session)


def _say_what_teaches_nothing(config: RunConfig, report: RoundReport) -> None:
    for task in config.teachers:
        if not any(report.losses.means.get(task, {"": 1.0}).values()):
            logging.getLogger("opd_ds").warning(
                "round %d: the teacher of task %s predicts exactly what the student predicts, so nothing is learned "
                "from it; are these the student's own weights?",
                report.round, task,
            )  # fmt: skip


# ---- checkpoints ----


@dataclass
class _Session:
    """What saving and leaving need. `saved`: rounds in the newest checkpoint, or 0."""

    parts: Parts
    store: CheckpointStore
    monitor: Monitor
    stop: StopRequest
    group: Group
    saved: int

    def save(self, done: int) -> None:
        parts = self.parts
        state = {
            "round": done,
            "job": os.environ.get(JOB_VARIABLE),
            "world_size": self.group.world.size,
            "zero_stage": parts.student.zero_stage,
            MODE_ENTRY: parts.config.rollout.mode,
            "shapes": parts.student.shapes,
            "adapter": lora.config_fields(parts.student.module, STUDENT_ADAPTER),
            "student": parts.student.scalar_state(),
            "copies": {copy.kind: copy.scalar_state() for copy in parts.trainer.saved},
            "run": parts.identity,
        }
        self.group.progress(f"the checkpoint of round {done}")
        self.monitor.tell(f"saving {self.store.place(done)}")
        entries = parts.student.state_dict()
        for copy in parts.trainer.saved:
            entries |= copy.state_dict()
        self.store.save(done, state, entries)
        self.saved = done

    def stop_if_asked(self, done: int) -> None:
        """Between rounds, or between the models of an evaluation: save what is not saved yet and leave. Collective."""
        code = self.stop.agreed(self.group)
        if code is None:
            return
        if done > self.saved:
            self.save(done)
        self.store.finish()
        state = f"state saved in {self.store.place(done)}; go on with --resume auto" if done else "nothing to save yet"
        ignore_signals()
        self.monitor.tell(f"interrupted after round {done}; {state}")
        raise Interrupted(code)


def _restore(parts: Parts, resumed: ResumePoint, group: Group) -> None:
    """Load the state, on any number of ranks and at any ZeRO stage."""
    with group.raise_on_any_rank():
        shards = ShardReader(resumed.checkpoint)
    parts.student.load_state_dict(shards, resumed.state["student"])
    for copy in parts.trainer.saved:
        copy.load_state_dict(shards, resumed.state["copies"][copy.kind])


# ---- evaluation ----


def _baselines(config: RunConfig, parts: Parts, session: _Session, *, fresh: bool) -> list[EvalModel]:
    """Base (or start) and teachers, their images drawn."""
    benchmark, tasks, monitor = parts.benchmark, parts.identity["tasks"], session.monitor
    if not config.evaluation.baselines or not benchmark.sets:
        return []
    guidance = student_guidance(config, list(benchmark.sets))
    # Before the first round the student is the base, or what it starts from instead.
    started_from = parts.identity["student"]["start"]
    name, sha256 = ("start", started_from) if started_from else ("base", parts.identity["base"]["sha256"])
    base = EvalModel(name, sha256, guidance, parts.student.gathered)
    teachers = [
        EvalModel(
            f"teacher:{task}",
            tasks[task]["teacher_sha256"],
            dict.fromkeys(benchmark.sets, parts.teachers.guidance(task)),
            partial(parts.teachers.drawing, task),
        )
        for task in config.teachers
    ]
    if not fresh and benchmark.missing(base):
        monitor.tell(f"images of the {name} were not drawn at the first start: the final table will lack it")
        models = teachers
    else:
        models = [base, *teachers]
    for model in models:
        benchmark.draw(model, partial(session.stop_if_asked, session.saved))
    return models


@contextmanager
def _final_student(parts: Parts) -> Iterator[StudentEngine]:
    """The averaged student where an EMA is kept and was updated."""
    with parts.ema.swapped_in() if parts.ema is not None and parts.ema.updated else nullcontext():
        yield parts.student


@contextmanager
def _drawing_student(parts: Parts) -> Iterator[Any]:
    """The same, to ask only."""
    with _final_student(parts) as student, student.gathered() as network:
        yield network


def _show_student(
    config: RunConfig, parts: Parts, report: RoundReport, watch: AsyncRewardEval | None, monitor: Monitor
) -> None:
    """Scores, reward records and image grids between rounds. Collective: rank 0 has `watch`, all ranks draw."""
    done, evaluator = report.round, parts.evaluator

    def due(every: int) -> bool:
        return every > 0 and done % every == 0

    if watch is not None:
        monitor.rewards(watch.finished())
    score_now = due(config.run.eval_every) and done < config.run.rounds
    show_now = due(config.run.image_every) and done < config.run.rounds
    held_out: dict[str, list[Shown]] = {}
    guidance = student_guidance(config, evaluator.tasks)
    if score_now or show_now or (due(config.watch.every) and config.watch.held_out):
        with _drawing_student(parts) as network:
            if due(config.watch.every) and config.watch.held_out:
                held_out = evaluator.draw(network, guidance, config.watch.held_out)
            if score_now:
                result = evaluator.run(network, guidance)
                monitor.scores(done, result.scores)
            if score_now or show_now:
                shown = result.shown if score_now else evaluator.draw(network, guidance, config.evaluation.grid_prompts)
                pictures = {task: [image for _, image in pairs] for task, pairs in shown.items()}
                prompts = {task: [item.prompt for item, _ in pairs] for task, pairs in shown.items()}
                edited = {task: references(item for item, _ in pairs) for task, pairs in shown.items()}
                monitor.picture("student", comparison_grid({"student": pictures}, prompts, edited), done)
    if watch is not None and due(config.watch.every):
        watch.submit(done, report.rolled, held_out)


def _finish(config: RunConfig, parts: Parts, baselines: list[EvalModel], session: _Session) -> None:
    """Export, final scores, table, image and report."""
    group, monitor = session.group, session.monitor
    folder, benchmark = config.run.output_dir, parts.benchmark
    session.stop_if_asked(config.run.rounds)
    if parts.ema is not None and not parts.ema.updated:
        monitor.say("the average of the weights was never updated: the last weights are exported")
    with _final_student(parts) as student:
        export_student(student, parts.family, config.student.kind, folder / EXPORT_FOLDER, group)
    results: Results | None = None
    scores: dict[str, Means] = {}
    if benchmark.sets:
        identity = group.broadcast(weights_sha256(folder / EXPORT_FOLDER) if group.world.is_main else None)
        guidance = student_guidance(config, list(benchmark.sets))
        models = [*baselines, EvalModel("student", identity, guidance, partial(_drawing_student, parts))]
        results = _evaluate(config, benchmark, models, session)
        scores = means(results)
    if group.world.is_main:
        headlines = {name: section.headline for name, section in config.evaluated.items()}
        data: dict[str, Any] = summary(scores, headlines)
        passes = pass_summary(config, read_metrics(folder / METRICS_FILE), data["tasks"])
        if passes is not None:
            data["passes"] = passes
            monitor.cost(tracked(passes), config.run.rounds)
        (folder / "summary.json").write_text(json.dumps(data, indent=1) + "\n")
        monitor.say("")
        if config.rewards and results is not None:
            metrics = [(name, label) for name, label in headlines.items() if label and name in results["sets"]]
            widths = interval_widths(results, metrics)
            print_table(monitor.console, data, {name: w for (name, _), w in zip(metrics, widths, strict=True)})
        for line in as_lines(passes) if passes is not None else ():
            monitor.say(line)
    if benchmark.sets:
        monitor.say(f"images:       {folder / 'grid.png'}")
        monitor.say(f"report:       {benchmark.folder / REPORT_FILE}")
    for name, place in places(config.trackers, folder).items():
        monitor.say(f"{name + ':':13} {place}")
    monitor.say(f"scores:       {folder / 'summary.json'}")
    monitor.say(f"model:        {folder / EXPORT_FOLDER}")
    if results is not None:
        require_scores(results)


def _evaluate(config: RunConfig, benchmark: Benchmark, models: list[EvalModel], session: _Session) -> Results:
    """The final evaluation, as `opd-ds eval` makes it."""
    group, monitor = session.group, session.monitor
    pause = partial(session.stop_if_asked, config.run.rounds)
    results = publish(benchmark, models, group, read_metrics(config.run.output_dir / METRICS_FILE), pause)
    monitor.scores(config.run.rounds, means(results)["student"])
    if group.world.is_main:
        count = config.evaluation.grid_prompts
        pictures = {model.name: benchmark.first_pictures(model, count) for model in models}
        prompts = {name: chosen["prompts"] for name, chosen in results["sets"].items()}
        grid = comparison_grid(pictures, prompts, benchmark.first_references(count))
        if grid is not None:
            monitor.picture("models", grid, config.run.rounds)
            frames_of(grid)[0].save(config.run.output_dir / "grid.png", **animation(grid))
    return results
