"""Whether a start of the run would be refused: the checks of `opd-ds train --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator

from opd_ds.cluster.world import World
from opd_ds.config.schema import RunConfig
from opd_ds.data.readers import locate
from opd_ds.doctor.findings import Seen
from opd_ds.engine import Alone
from opd_ds.runs.preflight import preflight

START = "start of the run"


def look_at_start(config: RunConfig, world: World, earlier: list[Seen]) -> Iterator[Seen]:
    """Nothing where `earlier` says already that files are missing, or where the network would be asked for prompts.

    Raises:
        UserError: as a start would.
    """
    prompts = {f"tasks.{name}.prompts": task.prompts for name, task in config.tasks.items()}
    prompts |= {
        f"{config.place(name)}.eval_prompts": section.eval_prompts
        for name, section in config.evaluated.items()
        if section.eval_prompts is not None
    }
    if wrong := [one.what for one in earlier if one.problem]:
        yield Seen(START, f"not checked: first see to {', '.join(wrong)}", checked=False)
    elif fetched := [key for key, chosen in prompts.items() if isinstance(locate(chosen, key), str)]:
        yield Seen(START, f"not checked: {fetched[0]} is a data set of the hub; see `--dry-run`", checked=False)
    else:
        preflight(config, Alone(), world, None)
        yield Seen(START, "nothing that it would refuse; checkpoints were not looked at")
