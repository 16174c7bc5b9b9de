"""speed.md and the plots, from speed.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.plots import grouped_bars, panels, write_csv, write_png
from opd_ds.utils.markdown import markdown_table

_MIB = 2**20
_PHASES = ("encode", "rollout", "rewards", "score", "train", "step")


def write_report(found: dict[str, Any], folder: Path) -> None:
    """Tables as speed.md; ratios and seconds per phase as PNG with their CSV."""
    parts = [_intro(found), _ratios(found)]
    if found["peers"]:
        parts.append(_peers(found["peers"]))
    parts.append(_phases(found))
    if found["switches"]:
        parts.append(_switches(found["switches"]))
    if "memory" in found:
        parts += [_memory(found["memory"]), _states(found["zero3_state"])]
    (folder / "speed.md").write_text("\n".join(parts), encoding="utf-8")
    _plot_ratios(found, folder / "ratios")
    _plot_phases(found, folder / "phases")


def _intro(found: dict[str, Any]) -> str:
    return (
        f"# Rounds of the public loop and ours: {found['size']}\n\n"
        f"Device: {found['device']}; torch {found['torch']}; {found['samples_per_task_and_device']} trajectories per "
        "task and device, three tasks, 10 steps of which 9 are trained. Ratios are medians over pairs of rounds that "
        "were timed in turns; above 1, ours is faster.\n"
    )


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _ratios(found: dict[str, Any]) -> str:
    entries = _entries(found)
    names = list(dict.fromkeys(name for _, _, entry in entries for name in entry["ratios"]))
    rows = [
        [setting, ranks, *(_times(entry["ratios"].get(name)) for name in names)] for ranks, setting, entry in entries
    ]
    return "## Ratios\n\n" + markdown_table(["setting", "ranks", *(name.replace("_", " ") for name in names)], rows)


def _entries(found: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    worlds = found["by_world_size"].items()
    return [(ranks, setting, entry) for ranks, settings in worlds for setting, entry in settings.items()]


def _peers(peers: list[dict[str, Any]]) -> str:
    names = list(peers[0]["ratios"])
    rows = [
        [
            one["what"],
            str(one["ranks"]),
            str(one["samples_per_task_and_device"]),
            *(_times(one["ratios"][name]) for name in names),
        ]
        for one in peers
    ]
    note = (
        "\nLoRA student, LoRA teachers. A round has as many trajectories per task and device as the peer's batch; ours "
        "with its own micro-batches, and with the peer's.\n"
    )
    head = ["the loop of", "ranks", "its batch", *names]
    return "## Peers, at ours and at their batch sizes\n\n" + markdown_table(head, rows) + note


def _phases(found: dict[str, Any]) -> str:
    rows = []
    peers = [(str(one["ranks"]), one["peer"], one) for one in found["peers"]]
    for ranks, setting, entry in [*_entries(found), *peers]:
        for name, loop in entry["loops"].items():
            times = [f"{1000 * loop['phases'][phase]:.0f}" if phase in loop["phases"] else "" for phase in _PHASES]
            passes = f"{loop['passes']['forward']} + {loop['passes']['backward']}"
            student = f"{loop['mfu_student']:.0%}" if "mfu_student" in loop else ""
            mfu = f"{loop['mfu_round']:.0%}"
            rows.append([setting, ranks, name, f"{1000 * loop['seconds']:.0f}", *times, passes, mfu, student])
    head = ["setting", "ranks", "loop", "ms per round", *_PHASES, "passes per rank, forward + backward"]
    note = (
        "\nMFU is against the best large matrix product of the same rank, in the same dtype. A fused round is one "
        "phase, `train`.\n"
    )
    return (
        "## Where the time goes\n\n" + markdown_table([*head, "MFU of the round", "of the student's"], rows, 3) + note
    )


def _switches(switches: list[dict[str, Any]]) -> str:
    rows = [[one["what"], one["setting"], str(one["ranks"]), _times(one["off_over_on"])] for one in switches]
    return "## Each by itself\n\n" + markdown_table(["what", "setting", "ranks", "brings"], rows, 2)


def _memory(memory: Mapping[str, Mapping[str, int]]) -> str:
    rows = [
        [setting, loop, f"{nbytes / _MIB:.0f}"] for setting, loops in memory.items() for loop, nbytes in loops.items()
    ]
    return "## Peak memory of one rank, beyond the libraries\n\n" + markdown_table(["setting", "loop", "MiB"], rows, 2)


def _states(states: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for ranks, entry in states.items():
        moved = entry["received"]
        gathered, reduced = moved.get("all_gather_into_tensor", 0.0), moved.get("reduce_scatter_tensor", 0.0)
        cells = [f"{nbytes / _MIB:.1f}" for nbytes in (entry["bytes"], gathered, reduced)]
        rows.append([ranks, cells[0], f"{entry['share']:.2f}", *cells[1:]])
    head = ["ranks", "state per rank, MiB", "of one rank's", "weights received per round, MiB", "gradients, MiB"]
    return "## ZeRO-3: full-parameter student with EMA\n\n" + markdown_table(head, rows)


def _plot_ratios(found: dict[str, Any], place: Path) -> None:
    entries = _entries(found)
    rows = [{"setting": setting, "ranks": ranks, **entry["ratios"]} for ranks, setting, entry in entries]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(place.with_suffix(".csv"), [{key: row.get(key) for key in keys} for row in rows])
    figure, axes = panels(len(found["by_world_size"]))
    for one, (ranks, settings) in zip(axes, found["by_world_size"].items(), strict=True):
        one.set_title(f"public loop's time / ours, {ranks} ranks")
        modes = {
            mode: [entry["ratios"].get(f"{mode}_over_public") or 0.0 for entry in settings.values()]
            for mode in ("buffered", "fused")
        }
        grouped_bars(one, list(settings), modes)
    write_png(figure, place.with_suffix(".png"))


def _plot_phases(found: dict[str, Any], place: Path) -> None:
    """Of the first world size."""
    first = next(iter(found["by_world_size"].values()))
    rows = [
        {"setting": setting, "loop": name, **{phase: loop["phases"].get(phase) for phase in _PHASES}}
        for setting, entry in first.items()
        for name, loop in entry["loops"].items()
    ]
    write_csv(place.with_suffix(".csv"), rows)
    figure, axes = panels(len(first))
    for one, (setting, entry) in zip(axes, first.items(), strict=True):
        one.set_title(f"{setting}: ms per round")
        loops = entry["loops"]
        milliseconds = {p: [1000 * loop["phases"].get(p, 0.0) for loop in loops.values()] for p in _PHASES}
        grouped_bars(one, list(loops), milliseconds)
    write_png(figure, place.with_suffix(".png"))
