"""Parts with the miniature: its recipe at ZeRO-0 and 3, rewards, running out of memory once, images of the student."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from statistics import median
from typing import Any, ParamSpec, TypeVar

import torch

from benchmarks.gpu.measure import GIB, time_rounds, watched
from benchmarks.gpu.session import Session, synchronise
from benchmarks.speed.worker import Loop
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import load_config
from opd_ds.evaluation.clips import frames_of
from opd_ds.evaluation.evaluator import student_guidance
from opd_ds.evaluation.reward_pool import RewardPool
from opd_ds.evaluation.tables import comparison_grid
from opd_ds.miniature.world import TASKS
from opd_ds.runs.setup import prepare

_ROUNDS_ON_CPU = 2
_P = ParamSpec("_P")
_T = TypeVar("_T")
_PICTURES = 4  # per task
_SAME_REWARD = 1e-4  # means of a round, between 0 and 1
_BUSY_CYCLES = 1_000_000_000  # of a GPU: half a second
_STAGES = (0, 3)
_PROMPTS = "'package:miniature/assets/prompts/%s/test.txt'"
_LITTLE = ("rollout.samples=2", "evaluation.steps=2")  # for CPUs


def _config(session: Session, *overrides: str) -> DistilConfig:
    little = () if session.on_gpu else _LITTLE
    folder = f"run.output_dir={session.scratch / 'miniature'}"
    config = load_config("miniature", None, [folder, "model.text_encoders=resident", *little, *overrides])
    assert isinstance(config, DistilConfig)
    return config


def miniature(session: Session) -> None:
    """30 rounds, or as many as time allows."""
    rounds = 30 if session.on_gpu else _ROUNDS_ON_CPU
    cases = [(stage, mode) for stage in _STAGES for mode in ("buffered", "fused")]
    for number, (stage, mode) in enumerate(cases):
        with session.check(f"ZeRO-{stage}, {mode}") as found:
            config = _config(session, f"deepspeed=zero{stage}", f"rollout.mode={mode}", f"run.rounds={rounds}")
            loop = Loop(mode, "ours", config, prepare(config, session.group).trainer)
            seconds = 0.8 * session.left / (len(cases) - number)
            measured = time_rounds(loop, session, most=rounds - 1, seconds=seconds)
            losses = measured["losses"]
            found |= {"rounds": len(losses), "first loss": losses[0], "last loss": losses[-1]}
            found |= {"first round, s": measured["first"], "s/round": measured["round"]}
            found |= {f"{name}, s": value for name, value in measured["phases"].items()}
            found["peak, GiB"] = measured["peak"] / GIB
            found["ok"] = losses[-1] < losses[0] or len(losses) < 30


def rewards(session: Session) -> None:
    """Rounds that learn from rewards: images are decoded and scored in the round, then in the thread beside it, on a
    stream of its own.
    """
    if session.on_gpu:
        _waits_for_the_round(session)
    rounds = 4 if session.on_gpu else _ROUNDS_ON_CPU
    little = ("rollout.micro_batch=24",) if session.on_gpu else ("rollout.samples=8", "rollout.steps=3")
    folder = f"run.output_dir={session.scratch / 'rewards'}"
    scores: dict[str, list[float]] = {}
    for way in ("in the round", "beside it"):
        with session.check(way) as found:
            config = load_config("miniature_nft_text", None, [folder, "deepspeed=zero0", *little])
            parts = prepare(config, session.group)
            if way == "in the round":
                parts.rewards.submit = _at_once  # type: ignore[method-assign]
            scores[way], seconds = [], []
            for index in range(rounds):
                synchronise()
                started = time.perf_counter()
                report = parts.trainer.run_round(index)
                synchronise()
                seconds.append(time.perf_counter() - started)
                scores[way].append(report.scores["text/mean"])
            found |= {"first round, s": seconds[0], "s/round": median(seconds[1:])}
            found |= {"first reward": scores[way][0], "last reward": scores[way][-1]}
            differences = [abs(a - b) for a, b in zip(scores[way], scores["in the round"], strict=True)]
            found |= {"difference": differences[0], "in later rounds": max(differences[1:])}
            found["ok"] = differences[0] < _SAME_REWARD  # later rounds have other weights, by rounding


def _waits_for_the_round(session: Session) -> None:
    """The thread reads what the round has still to write, and would read too early if it did not wait."""
    with session.check("reads what was written before") as found:
        pool = RewardPool({}, torch.clone, session.group.device)
        for name in ("waiting", "at once"):
            value = torch.zeros(1024, device=session.group.device)
            synchronise()
            torch.cuda._sleep(_BUSY_CYCLES)
            value.fill_(1)
            read = pool.submit(value.cpu) if name == "waiting" else pool._worker.submit(value.cpu)
            found[name] = float(read.result().mean())
        found["ok"] = (found["waiting"], found["at once"]) == (1.0, 0.0)


def _at_once(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
    done: Future[_T] = Future()
    done.set_result(work(*args, **kwargs))
    return done


def out_of_memory(session: Session) -> None:
    """The same round with and without a limit that scoring all pairs at once exceeds."""
    with session.check("halved once") as found:
        overrides = (
            "deepspeed=zero0",
            "rollout.samples=128",
            "rollout.steps=4",
            "rollout.micro_batch=16",
            "rollout.trained_steps={fraction: 1.0}",
            "train.micro_batch=16",
            "student.gradient_checkpointing=true",
            "scoring.micro_batch=auto",
        )
        config = _config(session, *overrides)
        unlimited = prepare(config, session.group).trainer
        before = torch.cuda.memory_allocated()
        with watched(unlimited, session) as phases:
            expected = unlimited.run_round(0)
        found["all at once, pairs"] = config.rollout.samples * config.trained_steps
        found |= {f"{name} needs, MiB": (peak - before) / 2**20 for name, peak in phases.peaks.items()}
        limited = prepare(config, session.group).trainer
        torch.cuda.empty_cache()
        others = max(peak for name, peak in phases.peaks.items() if name != "score") - before
        allowed = torch.cuda.memory_reserved() + others + 0.5 * max(phases.peaks["score"] - before - others, 0)
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        try:
            report = limited.run_round(0)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        found |= {"allowed, MiB": allowed / 2**20, "found, pairs": limited._scoring.size}
        difference = abs(report.losses.loss - expected.losses.loss) / expected.losses.loss
        found |= {"difference of the loss": difference}
        found["difference of the norm"] = abs(report.grad_norm - expected.grad_norm) / expected.grad_norm
        found["ok"] = limited._scoring.size is not None and difference < 1e-3


def evaluation(session: Session) -> None:
    """Images and their rewards after a round, from the student whole and from the sharded one."""
    for stage in _STAGES:
        with session.check(f"ZeRO-{stage}") as found:
            limits = [f"tasks.{task}.eval_prompts={{path: {_PROMPTS % task}, limit: {_PICTURES}}}" for task in TASKS]
            config = _config(session, f"deepspeed=zero{stage}", "evaluation.samples_per_prompt=1", *limits)
            parts = prepare(config, session.group)
            parts.trainer.run_round(0)
            evaluator = parts.evaluator
            with parts.student.gathered() as network:
                result = evaluator.run(network, student_guidance(config, evaluator.tasks))
            for task, means in result.scores.items():
                found |= {f"{task}: {label}": value for label, value in means.items()}
            shown: dict[str, Any] = {task: [image for _, image in pairs] for task, pairs in result.shown.items()}
            prompts = {task: [item.prompt for item, _ in pairs] for task, pairs in result.shown.items()}
            grid = comparison_grid({"student": shown}, prompts, {})
            assert grid is not None
            file = session.results / f"student_zero{stage}.png"
            frames_of(grid)[0].save(file)
            found["file"] = file.name
