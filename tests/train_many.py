"""Several runs one after the other in one process group: arguments are `CONFIG`, or `CONFIG:RESUME`."""

from __future__ import annotations

import sys
from pathlib import Path

from opd_ds.engine import init_group
from opd_ds.failures import leave
from opd_ds.launch import prepare_environment, who_am_i
from opd_ds.loading import load_config
from opd_ds.quiet import quiet_libraries
from opd_ds.run import train


def main(arguments: list[str]) -> None:
    world = who_am_i()
    prepare_environment(world)
    quiet_libraries()
    with init_group(world) as group:
        for argument in arguments:
            file, _, resume = argument.partition(":")
            train(load_config(None, Path(file), []), group, resume or "never")


if __name__ == "__main__":
    try:
        main([argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
    except BaseException as error:
        leave(error)
