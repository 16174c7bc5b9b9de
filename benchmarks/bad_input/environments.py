"""What launchers and schedulers put into the environment."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from benchmarks.bad_input.mutations import odd_values
from benchmarks.bad_input.trial import Kind
from opd_ds.cluster.world import detect_world

_LAUNCHERS: list[dict[str, str]] = [
    {},
    {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
     "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x"},
    {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "::1", "CROSS_SIZE": "1"},
    {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
     "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
     "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "gpu[003-007,9],x1"},
]  # fmt: skip
# A shell inside `srun -n2 --pty`, and what is left over of other launches.
_REPORTED = (
    {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
     "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "a"},
    {"RANK": "0"},
    {"MASTER_PORT": "0"},
    {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "99999"},
    _LAUNCHERS[1] | _LAUNCHERS[4],
)  # fmt: skip
_COUNTS = [
    "2(x3),1",
    "1(x0)",
    "0",
    "2(x99999999999)",
    "(x2)",
    "2(x2",
    "2,,1",
    "²",
    "٣",
    "1_0",
    "+1",
    " 2",
    "0x2",
    "-1",
    "1e3",
]
_HOSTS = ["a[1-3", "[", "]", "a[]", "a[-]", "a,b", ",", "a[1-2]b[3-4]", "host name", "a" * 300]


@st.composite
def _environments(draw: DrawFn) -> dict[str, str]:
    found = dict(draw(st.sampled_from(_LAUNCHERS)))
    others = [(name, value) for launcher in _LAUNCHERS for name, value in launcher.items()]
    odd = st.sampled_from([*_COUNTS, *_HOSTS]) | odd_values().map(str).filter(lambda text: "\0" not in text)
    for _ in range(draw(st.integers(1, 3))):
        name, value = draw(st.sampled_from(others))
        if draw(st.booleans()):
            found[name] = draw(st.just(value) | odd)
        else:
            found.pop(name, None)
    return found


def _write(_: dict[str, str], folder: Path) -> None:
    pass


def _detect(environment: dict[str, str], folder: Path) -> None:
    world = detect_world(environment)
    if not 0 <= world.rank < world.size or not 0 <= world.local_rank < world.local_size <= world.size:
        raise AssertionError(f"no world: {world}")


KINDS = (Kind("environment", _environments(), _write, _detect, known=_REPORTED),)
