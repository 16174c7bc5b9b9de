"""The table of all kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import datasets
import huggingface_hub

from benchmarks.bad_input.trial import Kind, Tally, try_many
from opd_ds.utils.logging import quiet_libraries
from opd_ds.utils.markdown import markdown_table

_ANSWERS = ("accepted", "refused", "failed")


def count_answers(kinds: Mapping[str, Kind], count: int, seed: int, say: Callable[[str], None]) -> bool:
    """Print a table, and each failure with its first input. Whether there was none."""
    quiet_libraries()
    with offline():
        tallies = {name: try_many(kind, count, seed) for name, kind in kinds.items()}
    total = sum((tally.answers for tally in tallies.values()), Tally().answers)
    rows = [(name, tally.answers) for name, tally in tallies.items()] + [("all", total)]
    say(
        markdown_table(("kind", "tried", *_ANSWERS), [(n, a.total(), *(a[what] for what in _ANSWERS)) for n, a in rows])
    )
    for name, tally in tallies.items():
        for reason, described in tally.failed.items():
            say(f"{name}: {reason}\n    {str(described)[:2000]!r}")
    return not total["failed"]


@contextmanager
def offline() -> Iterator[None]:
    """A misspelt path may look like the name of a repository on the hub: nobody is asked for it."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
