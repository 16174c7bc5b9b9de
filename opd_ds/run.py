"""A run from start to end: resume, rounds, checkpoints, evaluation, export."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from opd_ds.checkpoint import CheckpointStore, read_state, refuse_other_run
from opd_ds.config import RunConfig
from opd_ds.engine import Group
from opd_ds.errors import Interrupted, UserError
from opd_ds.evaluation import EvaluationResult, comparison_grid, print_table, summary
from opd_ds.export import export_student
from opd_ds.monitor import Monitor
from opd_ds.preparation import Parts, prepare

BASELINES_FILE = "baselines.pt"


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
    store = CheckpointStore(config.run.output_dir / "checkpoints", config.run.keep_checkpoints, group)
    with group.agreed():
        checkpoint = _find_checkpoint(store, resume)
    parts = prepare(config, group)
    start = _restore(parts, checkpoint, group) if checkpoint else 0
    with Monitor(config, group.world, start) as monitor:
        if checkpoint:
            monitor.say(f"resumed from {checkpoint}, {start} rounds done")
        baselines = _baselines(config, parts, group, monitor, fresh=checkpoint is None)
        for index in range(start, config.run.rounds):
            monitor.round(parts.trainer.run_round(index))
            done = index + 1
            stopping = stop.agreed(group)
            if stopping or done % config.run.checkpoint_every == 0 or done == config.run.rounds:
                saved = _save(parts, store, done, group)
                if stopping and done < config.run.rounds:
                    monitor.say(f"interrupted after round {done}; state saved in {saved}; go on with --resume auto")
                    raise Interrupted(0)
            _show_student(config, parts, done, monitor)
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
            parts.ema.save(folder / f"ema-rank{group.world.rank}.pt")

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
        parts.ema.load(checkpoint / f"ema-rank{group.world.rank}.pt")
    return int(state["round"])


# ---- evaluation ----


def _baselines(
    config: RunConfig, parts: Parts, group: Group, monitor: Monitor, *, fresh: bool
) -> dict[str, EvaluationResult]:
    """Base and teachers on the held-out prompts, measured once at the start: the student still is the base then."""
    evaluator, file = parts.evaluator, config.run.output_dir / BASELINES_FILE
    if not config.evaluation.baselines or not evaluator.tasks:
        return {}
    if not fresh:
        if not file.is_file():
            monitor.say(f"no {file.name} from the first start: the final table will lack base and teachers")
            return {}
        stored = torch.load(file, weights_only=True)
        return {model: EvaluationResult(**fields) for model, fields in stored.items()}
    monitor.say("scoring base and teachers on the held-out prompts")
    results = {"base": evaluator.run(parts.student, evaluator.student_guidance())}
    for task in config.tasks:
        guidance = dict.fromkeys(evaluator.tasks, parts.teachers.guidance(task))
        with parts.teachers.active(task) as network:
            results[f"teacher:{task}"] = evaluator.run(network, guidance)
    if group.world.is_main:
        torch.save({model: vars(result) for model, result in results.items()}, file)
    return results


def _evaluate_student(parts: Parts, *, pictures_only: bool = False) -> EvaluationResult:
    """The averaged student where an EMA is kept."""
    guidance = parts.evaluator.student_guidance()
    if parts.ema is None:
        return parts.evaluator.run(parts.student, guidance, pictures_only=pictures_only)
    with parts.ema.swapped_in():
        return parts.evaluator.run(parts.student, guidance, pictures_only=pictures_only)


def _show_student(config: RunConfig, parts: Parts, done: int, monitor: Monitor) -> None:
    """Scores and image grids while the run goes on."""
    last = done == config.run.rounds
    score_now = config.run.eval_every and done % config.run.eval_every == 0 and not last
    show_now = config.run.image_every and done % config.run.image_every == 0 and not last
    if not parts.evaluator.tasks or not (score_now or show_now):
        return
    result = _evaluate_student(parts, pictures_only=not score_now)
    if score_now:
        monitor.scores(done, result.scores)
    monitor.grid("student", {"student": result}, done)


def _finish(
    config: RunConfig, parts: Parts, baselines: dict[str, EvaluationResult], group: Group, monitor: Monitor
) -> None:
    """Export, final scores, table and picture."""
    folder = config.run.output_dir
    if parts.ema is not None:
        with parts.ema.swapped_in():
            export_student(parts.student, parts.family, config.student.kind, folder / "export", group)
    else:
        export_student(parts.student, parts.family, config.student.kind, folder / "export", group)
    results = dict(baselines)
    if parts.evaluator.tasks:
        results["student"] = _evaluate_student(parts)
        monitor.scores(config.run.rounds, results["student"].scores)
    if not group.world.is_main:
        return
    data: dict[str, Any] = summary(results, {name: task.headline for name, task in config.tasks.items()})
    (folder / "summary.json").write_text(json.dumps(data, indent=1) + "\n")
    monitor.say("")
    if results:
        print_table(monitor.console, data)
        monitor.grid("models", results, config.run.rounds)
        comparison_grid(results).save(folder / "grid.png")
        monitor.say(f"pictures:     {folder / 'grid.png'}")
    monitor.say(f"TensorBoard:  tensorboard --logdir {folder / 'tensorboard'}")
    monitor.say(f"scores:       {folder / 'summary.json'}")
    monitor.say(f"model:        {folder / 'export'}")
