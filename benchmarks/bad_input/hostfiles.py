"""Hostfiles, as `launchers/hostfile_train.sh` takes them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from benchmarks.bad_input.mutations import damaged
from benchmarks.bad_input.trial import Kind, RefusedError
from opd_ds.config.paths import package_root

_GOOD = b"# two machines\nnode1 slots=8\nnode2 slots=8\n\n"
_LINES = (
    "node1", "node1 slots=", "node1 slots=0", "node1 slots=-1", "node1 slots=8.5", "node1 slots=eight", "slots=8",
    "node1 slots=8 node2 slots=8", "node1:8", "node1 8", "node1 gpus=8", "node1 slots = 8", "node1\tslots=8",
    "node1 slots=8 # fast", "node1 slots=8\r", "node2 slots=8", "10.0.0.1 slots=8", "::1 slots=8", "[::1] slots=8",
    "user@node1 slots=8", "nöde slots=8", "node1 slots=99999999999999999999", "localhost slots=1", "*", "$(id) slots=1",
)  # fmt: skip
_STANDS_FOR_A_COMMAND = "#!/bin/sh\nexit 0\n"  # the launcher and ssh are not what is tried


@st.composite
def _hostfiles(draw: DrawFn) -> bytes:
    if draw(st.booleans()):
        lines = draw(st.lists(st.sampled_from(_LINES), max_size=4))
        return ("\n".join(lines) + draw(st.sampled_from(["", "\n"]))).encode()
    return draw(damaged(_GOOD))


def _write(content: bytes, folder: Path) -> None:
    (folder / "hostfile").write_bytes(content)


def _ask(content: bytes, folder: Path) -> None:
    script = package_root() / "launchers" / "hostfile_train.sh"
    with tempfile.TemporaryDirectory() as commands:
        for name in ("deepspeed", "pdsh", "opd-ds"):
            command = Path(commands, name)
            command.write_text(_STANDS_FOR_A_COMMAND)
            command.chmod(0o755)
        environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "MASTER_PORT": "29500"}
        asked = ["bash", str(script), "hostfile", "--recipe", "miniature"]
        ended = subprocess.run(asked, cwd=folder, env=environment, capture_output=True, check=False)
    said = ended.stderr.decode(errors="replace")
    if ended.returncode == 2:
        raise RefusedError(said)
    if ended.returncode or said:
        raise AssertionError(f"exit code {ended.returncode}: {said}")
    lines = [line for line in content.decode(errors="replace").splitlines() if not re.match(r"\s*(#|$)", line)]
    if not lines or not all(re.match(r"\s*\S+\s+slots=\d*[1-9]", line) for line in lines):
        raise AssertionError(f"taken for hosts: {lines}")


KINDS = (
    Kind(
        "hostfile", _hostfiles(), _write, _ask, known=(b"", b"\n# nothing\n", b"a slots=0\n", b"a slots=1\na slots=1")
    ),
)
