"""Several runs of `opd-ds train` one after the other in one process group, as starting costs more than a tiny run.

    deepspeed --num_accelerators 2 --module opd_ds.testing.train_many CONFIG[:RESUME]...

Beside each config a JSON of its name says how it ended: `{"seconds": ...}` or `{"error": ...}`. The first run that
fails ends the group, as it would by itself: ranks that disagree about what comes next would wait for one another.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

from opd_ds.cluster.rendezvous import unused_port


def under_launcher(ranks: int) -> list[str]:
    """The command line, up to what is started, of `ranks` processes under the deepspeed launcher, on a free port."""
    launcher = Path(sys.executable).parent / "deepspeed"
    return [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(unused_port())]


def main(arguments: list[str]) -> None:
    """Every rank: train the configs in order."""
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import detect_world
    from opd_ds.config.loading import load_config
    from opd_ds.engine import init_group
    from opd_ds.runs.train import train
    from opd_ds.utils.logging import quiet_libraries

    world = detect_world()
    prepare_environment(world)
    quiet_libraries()
    settings = {argument: load_config(None, Path(argument.partition(":")[0]), []) for argument in arguments}
    (teacher_ranks,) = {config.scoring.ranks for config in settings.values()}
    with init_group(world, teacher_ranks=teacher_ranks) as group:
        for argument in arguments:
            name, _, resume = argument.partition(":")
            config = Path(name)
            result, started = config.with_suffix(".json"), time.monotonic()
            try:
                train(settings[argument], group, resume or "never")
            except Exception as error:
                # The rank that is first has the cause; on the others it may be a lost connection.
                with contextlib.suppress(FileExistsError), result.open("x", encoding="utf-8") as file:
                    json.dump({"error": said(error)}, file)
                raise
            if world.is_main:
                result.write_text(json.dumps({"seconds": round(time.monotonic() - started, 2)}), encoding="utf-8")


def said(error: Exception) -> str:
    """Kind and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


if __name__ == "__main__":
    from opd_ds.cluster.failures import report_and_exit

    try:
        main([argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
    except BaseException as error:
        report_and_exit(error)
