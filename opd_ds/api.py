"""What Python programs call, and the commands too. `import opd_ds` gives all of it, and loads a part when it is used.

    config = opd_ds.load_config("miniature", overrides=["run.rounds=20"])
    opd_ds.train(config, callbacks=[lambda report: print(report.round, report.losses.loss)])

A program that a launcher starts once per device is one run on all of them, as a command is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from opd_ds.cluster.rendezvous import prepare_environment
from opd_ds.cluster.roles import Roles
from opd_ds.cluster.world import detect_world
from opd_ds.config.schema import RunConfig
from opd_ds.errors import UserError

if TYPE_CHECKING:
    from opd_ds.engine import Group
    from opd_ds.evaluation.results import Results
    from opd_ds.merge.merging import Method
    from opd_ds.models import ModelFamily
    from opd_ds.plan.devices import Devices
    from opd_ds.plan.planner import Comparison
    from opd_ds.runs.evaluate import Choice
    from opd_ds.training.trainer import RoundReport


def load_config(
    recipe: str | None = None, file: str | Path | None = None, *, overrides: Sequence[str] = ()
) -> RunConfig:
    """A run config, checked.

    Args:
        recipe: the name of a shipped recipe.
        file: a YAML file.
        overrides: `"key.path=value"`, as `--set` takes them.

    Raises:
        UserError: a key or value is wrong.
    """
    from opd_ds.config.loading import load_config as load

    return load(recipe, None if file is None else Path(file), list(overrides))


def train(
    config: RunConfig,
    *,
    resume: str = "never",
    allowed: Sequence[str] = (),
    callbacks: Sequence[Callable[[RoundReport], None]] = (),
) -> Path:
    """A whole run, distilling or learning from rewards, as `opd-ds train`; returns the folder of the exported student.

    Args:
        resume: `never`, `auto`, or the folder of a checkpoint.
        allowed: keys that may differ from those of the run that is resumed.
        callbacks: called after every round on every rank, with what the round measured. They must not call
            collectives of their own on some ranks only.

    Raises:
        UserError: something the user can fix, before the first round.
    """
    with _group(config, config.scoring.ranks) as group:
        from opd_ds.checkpoint.export_student import EXPORT_FOLDER
        from opd_ds.runs.train import train as run

        run(config, group, resume, list(allowed), callbacks)
    return config.run.output_dir / EXPORT_FOLDER


def teach(
    config: RunConfig,
    *,
    resume: str = "never",
    allowed: Sequence[str] = (),
    callbacks: Sequence[Callable[[RoundReport], None]] = (),
) -> Path:
    """`train` for a config that learns from rewards.

    Raises:
        UserError: it does not; and as `train`.
    """
    if config.teachers:
        raise UserError("the config has no section `teach`; distillations start with `train`")
    return train(config, resume=resume, allowed=allowed, callbacks=callbacks)


def evaluate(
    config: RunConfig, choice: Choice | None = None, show: Callable[[Results, Path], None] | None = None
) -> Results:
    """Draw, score and compare models, as `opd-ds eval`.

    Args:
        choice: models, prompts and rewards beside or instead of the config's.
        show: called on rank 0 with the results and their folder; default: prints tables.

    Raises:
        UserError: before any network loads.
    """
    with _group(config) as group:
        from opd_ds.runs.evaluate import Choice, show_table
        from opd_ds.runs.evaluate import evaluate as run

        return run(config, choice or Choice(), group, show or show_table)


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    config: RunConfig | None = None,
    *,
    averaged: bool = True,
    merge: bool = False,
    form: str = "diffusers",
    dtype: str | None = None,
) -> Path:
    """Write a checkpoint in the form that diffusers loads, with a model card, as `opd-ds export`; returns which one.

    Args:
        checkpoint: a folder round-NNNNNN, or the output folder of a run, whose newest checkpoint is taken.
        config: default: config.yaml of the checkpoint's run.
        averaged: the averaged weights instead of the last ones.
        merge: add a LoRA to its base and write a whole pipeline.
        form: of a LoRA, `diffusers` or `peft`.
        dtype: fp32, bf16 or fp16; default: the run's precision, fp32 for a LoRA.

    Raises:
        UserError: the checkpoint is damaged, or `out` exists.
    """
    from opd_ds.checkpoint.store import find_checkpoint, read_state
    from opd_ds.runs.export import export_checkpoint as export
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    place = find_checkpoint(Path(checkpoint).resolve())
    read_state(place)
    settings = config or load_config(file=place.parents[1] / "config.yaml")
    export(settings, place, Path(out), averaged=averaged, merge=merge, form=form, dtype=dtype)
    return place


def merge_weights(
    out: str | Path,
    sources: Sequence[str],
    method: Method | None = None,
    *,
    base: str | None = None,
    family: str = "sd3",
    trust_base: bool = False,
) -> float | None:
    """Merge teachers without training, as `opd-ds merge`.

    Args:
        out: a new folder.
        sources: `NAME_OR_PATH[:WEIGHT]` each.
        method: default: linear.

    Returns:
        The relative error of bringing merged deltas to their rank, where that was done.

    Raises:
        UserError: the sources do not fit together.
    """
    from opd_ds.merge.files import parse_sources
    from opd_ds.merge.merging import Method, merge
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    chosen = method or Method("linear")
    return merge(Path(out), parse_sources(list(sources)), chosen, base=base, family=family, trust_base=trust_base)


def plan_run(config: RunConfig, devices: str | Devices = "8xH100-80GB") -> Comparison:
    """Memory and time of a run before it starts, as it is and in the fastest setting that fits, as `opd-ds plan`.

    Args:
        devices: such as `8xH100-80GB` or `2xcpu`, or what `opd_ds.plan.devices.parse_devices` returns.

    Raises:
        UserError: unknown devices.
    """
    from opd_ds.cluster.world import World
    from opd_ds.plan.devices import parse_devices

    asked = parse_devices(devices, "devices") if isinstance(devices, str) else devices
    prepare_environment(World())
    from opd_ds.plan.planner import compare
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    return compare(config, asked)


def load_family(config: RunConfig, device: str = "cpu") -> ModelFamily:
    """The config's base as a model family, for loops of one's own: it loads networks, encodes prompts, asks networks
    for velocities and decodes latents.

    Raises:
        UserError: the base is not there, or of another family.
    """
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    from torch import device as torch_device

    from opd_ds.training.networks import load_family as load

    return load(config, find(config.model.path), torch_device(device))


def find(place: str) -> Path:
    """The folder or file that configs name like this: a path, `package:...`, or a repository of the Hugging Face Hub,
    which is downloaded.

    Raises:
        UserError: nothing is there.
    """
    from opd_ds.config.paths import resolve_path

    return resolve_path(place, "place")


@contextmanager
def _group(config: RunConfig, teacher_ranks: int = 0) -> Iterator[Group]:
    """This process's rank among those that a launcher started; by itself it is the only one."""
    world = detect_world()
    Roles(world, teacher_ranks)  # refuses what is impossible before ranks look for each other
    prepare_environment(world)
    from opd_ds.engine import init_group
    from opd_ds.utils.logging import log_to_terminal, quiet_libraries

    quiet_libraries()
    log_to_terminal(world.rank)
    # The watch over hangs speaks first; a collective's own timeout is only there in case it cannot.
    timeout = timedelta(minutes=config.run.hang_minutes + 10)
    deterministic = config.run.deterministic
    with init_group(world, timeout, deterministic=deterministic, teacher_ranks=teacher_ranks) as group:
        yield group
