"""`opd-ds miniature`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The embedded world: a tiny SD3 on handwritten digits.")


@app.command("build")
def build(
    output_dir: Annotated[Path, typer.Option(help="where base, teachers and prompts are written")],
    seed: int = 0,
) -> None:
    """Make the miniature world from scratch (about 25 minutes on 2 cores; needs scikit-learn)."""
    from opd_ds.cluster.rendezvous import prepare_environment
    from opd_ds.cluster.world import World
    from opd_ds.engine import init_group
    from opd_ds.miniature.build import build as build_world
    from opd_ds.utils.logging import quiet_libraries

    prepare_environment(World())
    quiet_libraries()
    with init_group(World()) as group:
        build_world(output_dir, group, seed=seed)


@app.command("build-editing")
def build_editing(
    output_dir: Annotated[Path, typer.Option(help="where base and prompts are written")] = Path("runs/editing"),
    seed: int = 0,
) -> None:
    """Make a small FLUX.1 Kontext that draws digits and recolours pictures of them (needs scikit-learn)."""
    from opd_ds.miniature.build_editing import build_editing as build_world
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    build_world(output_dir, seed=seed)
