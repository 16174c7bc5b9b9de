"""`python -m benchmarks growth`: what grows with prompts, encoded prompts, tasks, ranks and resolution, and how fast.

Prompts and text caches are measured, in processes of their own; ranks are played in a fake process group
(`fake_world.py`); what tasks and resolution take is counted by the plan of the miniature, in which nothing hides behind
a large network.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.loading_worker import anonymous_memory
from benchmarks.plots import panels, require_plots, write_csv
from opd_ds.config.loading import load_config
from opd_ds.config.schema import RunConfig
from opd_ds.data import PromptSet, draw_prompts
from opd_ds.data.text_cache import TextCache
from opd_ds.diffusion.rollout import chunks
from opd_ds.errors import UserError
from opd_ds.models import Conditioning
from opd_ds.plan.costs import Costs
from opd_ds.plan.devices import parse_devices
from opd_ds.plan.network import find_model
from opd_ds.plan.passes import Passes, round_passes
from opd_ds.plan.planner import make_plan
from opd_ds.runs.encode import PER_SHARD
from opd_ds.utils.markdown import markdown_table

PROMPTS = (10, 1_000, 100_000, 1_000_000)
TASKS, RANKS, SIDES = (1, 2, 5, 10, 20), (2, 8, 64, 512), (8, 16, 24, 32)
_MIB = 2**20
_WORDS = (
    "a photograph of",
    "red and blue",
    "cats",
    "under the old bridge",
    "in morning light",
    "with snow",
    "and a sign",
)

Row = dict[str, Any]


def bench(folder: Path, most: int, say: Callable[[str], None]) -> None:
    """Write growth.json, growth.md and growth.png.

    Args:
        most: prompts of the largest set.
    """
    require_plots()
    folder.mkdir(parents=True, exist_ok=True)
    counts = sorted({*(count for count in PROMPTS if count < most), most})
    found: dict[str, list[Row]] = {}
    parts = {
        "prompts": lambda: _prompts(counts, folder),
        "text cache": lambda: _encoded(counts, folder),
        "tasks": _tasks,
        "ranks": _ranks,
        "resolution": _resolution,
    }
    for name, rows in parts.items():
        found[name] = list(rows())
        say(as_markdown({name: found[name]}))
    (folder / "growth.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "growth.md").write_text(as_markdown(found), encoding="utf-8")
    _draw(found, folder)


def as_markdown(found: Mapping[str, Sequence[Row]]) -> str:
    """One table a part."""
    return "\n".join(markdown_table(list(rows[0]), (list(row.values()) for row in rows), 0) for rows in found.values())


def write_prompts(file: Path, count: int) -> None:
    """`count` different prompts, in a .txt file or, with metadata as GenEval's, in a .jsonl file."""
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            prompt = f"{' '.join(_WORDS[(number + place) % len(_WORDS)] for place in range(5))} {number}"
            row = {"prompt": prompt, "tag": "counting", "include": [{"class": "cat", "count": number % 4}]}
            stream.write((prompt if file.suffix == ".txt" else json.dumps(row)) + "\n")


def read_and_draw(file: Path) -> Row:
    """What a start does with a prompt set, and a round: seconds of the processor, bytes of anonymous memory kept."""
    before, started = anonymous_memory(), time.process_time()
    prompts = PromptSet.read(file)
    _ = prompts.repeats, prompts.own_negatives
    read = time.process_time() - started
    draw_prompts(len(prompts), 24, 0, 0, "")
    started = time.process_time()
    draw_prompts(len(prompts), 24, 0, 1, "")
    drawn = time.process_time() - started
    return {"seconds": read, "of a round": drawn, "kept": anonymous_memory() - before}


def write_cache(folder: Path, count: int) -> None:
    """A text cache of `count` prompts, as many to a shard as `opd-ds data encode` writes, with few numbers each."""
    cache = TextCache(folder)
    cache.claim({"files": {}})
    row = Conditioning({"embeds": torch.zeros(1, 2, 4), "pooled": torch.zeros(1, 4)})
    for shard in chunks(count, PER_SHARD):
        cache.add({_encoded_prompt(number): row for number in range(count)[shard]})


def open_and_read(folder: Path, count: int) -> Row:
    """What a start does with a text cache of `count` prompts, and a round: as `read_and_draw`."""
    before, started = anonymous_memory(), time.process_time()
    cache = TextCache(folder)
    lacking = len(cache.missing(map(_encoded_prompt, range(count))))
    opened, kept = time.process_time() - started, anonymous_memory() - before
    started = time.process_time()
    cache.read([_encoded_prompt(number * (count // 24) % count) for number in range(24)])
    return {"seconds": opened, "of a round": time.process_time() - started, "kept": kept, "lacking": lacking}


def _encoded_prompt(number: int) -> str:
    return f"{' '.join(_WORDS)} {number}"


def _prompts(counts: Sequence[int], folder: Path) -> Iterator[Row]:
    for ending in ("txt", "jsonl"):
        for count in counts:
            file = folder / f"prompts.{ending}"
            write_prompts(file, count)
            found, size = _apart("prompts", file, count), file.stat().st_size
            file.unlink()
            yield {"file": f".{ending}", "prompts": count, "file, MiB": round(size / _MIB, 1)} | _started(found, "read")


def _encoded(counts: Sequence[int], folder: Path) -> Iterator[Row]:
    for count in counts:
        place = folder / "cache"
        shutil.rmtree(place, ignore_errors=True)
        write_cache(place, count)
        found = _apart("cache", place, count)
        shutil.rmtree(place)
        if found["lacking"]:
            raise UserError(f"a text cache of {count} prompts lacks {found['lacking']} of them")
        yield {"encoded prompts": count} | _started(found, "open")


def _started(found: Row, what: str) -> Row:
    return {
        f"seconds to {what}": round(found["seconds"], 2),
        "milliseconds of a round": round(1e3 * found["of a round"], 2),
        "kept in memory, MiB": round(found["kept"] / _MIB, 1),
    }


def _apart(what: str, place: Path, count: int) -> Row:
    """What `_PARTS[what]` finds in a process of its own."""
    command = [sys.executable, "-m", __name__, what, str(place), str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{what} of {count} ended with exit code {done.returncode}: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _tasks() -> Iterator[Row]:
    """Each with a teacher of its own, on the device, and the recipe's trajectories."""
    config = load_config("miniature", None, ["train.schedule=together"])
    costs, devices = Costs(find_model(config), config), parse_devices("1xcpu", "--gpus")
    task = config.tasks["text"]
    for count in TASKS:
        tasks = {}
        for number in range(count):
            teacher = task.teacher.model_copy(update={"path": f"teacher-{number}"})  # type: ignore[attr-defined]
            tasks[f"task{number}"] = task.model_copy(update={"teacher": teacher})
        several = config.model_copy(update={"tasks": tasks})
        plan = make_plan(several, costs, devices)
        units = sum((one for name in tasks for one in round_passes(several, name).values()), Passes()).units
        yield {
            "tasks": count,
            "pass units a round": units,
            "memory, MiB": round(plan.memory.peak / _MIB, 1),
            "seconds a round, planned": round(plan.seconds.total, 3),
        }


def _ranks() -> Iterator[Row]:
    for ranks in RANKS:
        command = [sys.executable, "-m", "benchmarks.fake_world", "zero3", str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{ranks} fake ranks ended with exit code {done.returncode}: {done.stderr[-800:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        received = found["collectives"].values()
        yield {
            "ranks": ranks,
            "state of a rank, MiB": round(found["state"] / _MIB, 2),
            "received in a round, MiB": round(sum(one["received"] for one in received) / _MIB, 2),
            "messages": sum(one["messages"] for one in received),
        }


def _resolution() -> Iterator[Row]:
    config = load_config("miniature", None, [])
    for side in SIDES:
        size = {"height": side, "width": side}
        larger: RunConfig = config.model_copy(update={"model": config.model.model_copy(update=size)})
        costs = Costs(find_model(larger), larger)
        forward, train = costs.forward(1), costs.train(1, checkpointing=False)
        yield {
            "side, pixels": side,
            "forward, MFLOP": round(forward.flops / 1e6, 1),
            "forward, MiB": round(forward.peak / _MIB, 2),
            "training, MiB": round(train.peak / _MIB, 2),
        }


def _draw(found: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """One panel a part, each column over the first number, all in parts of their first value; what is too little to be
    measured at first begins on the line.
    """
    figure, axes = panels(len(found))
    for one, (name, rows) in zip(axes, found.items(), strict=True):
        write_csv(folder / f"growth_{name}.csv", rows)
        rows = [row for row in rows if row.get("file", ".jsonl") == ".jsonl"]
        (first, *others) = [key for key in rows[0] if key != "file"]
        one.set(title=name, xlabel=first, xscale="log", yscale="log", ylabel="of the first")
        at = [row[first] for row in rows]
        one.plot(at, [value / at[0] for value in at], "--", color="#999999", label="linear")
        for key in others:
            measured = [(x / at[0], row[key]) for x, row in zip(at, rows, strict=True) if row[key]]
            start, least = measured[0]
            one.plot([x * at[0] for x, _ in measured], [start * y / least for _, y in measured], ".-", label=key)
        one.legend(fontsize="small")
    figure.savefig(folder / "growth.png")


_PARTS: dict[str, Callable[[Path, int], Row]] = {
    "prompts": lambda file, _: read_and_draw(file),
    "cache": open_and_read,
}

if __name__ == "__main__":
    print(json.dumps(_PARTS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
