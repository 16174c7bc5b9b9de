"""The table of the docs: each reward in an environment that holds the core and this reward's extra, nothing else.

    python -m benchmarks reward-table --folder /tmp/reward_table --output runs/reward_table.md

Makes a virtual environment with the core install of this checkout, once, and for each extra another one that sees the
core's packages through a .pth file and gets `pip install 'opd-ds[extra]'`, the line that our messages give. Each reward
is then probed in its environment by `probe.py`: does it import, does it score (with small random weights of the
true architecture, or its real models where these come with pip), does it refuse a file that lacks a tensor, what does
it say without weights, and in the core environment without its extra. Environments that exist are used again.
`--constraint` is handed to pip, for a machine without a GPU: torch==2.13.0 keeps the CPU build.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from opd_ds.utils.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[2]
_HEAD = (
    "reward",
    "installs alone",
    "imports",
    "scores",
    "refuses a wrong file",
    "without weights",
    "without the extra",
)
Report = dict[str, Any]


def python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def output_of(*command: str | Path) -> str:
    """Standard output; what goes wrong ends the table with the command's own message."""
    words = [str(part) for part in command]
    # Beside the interpreter: in the checkout, Python would find the checkout's package.
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(words[0]).parent).stdout


def install(environment: Path, what: str, options: list[str]) -> None:
    output_of(python_of(environment), "-m", "pip", "install", "--quiet", *options, what)


def packages(environment: Path) -> list[str]:
    """What is installed in the environment itself."""
    listed = json.loads(output_of(python_of(environment), "-m", "pip", "list", "--local", "--format", "json"))
    here = output_of(python_of(environment), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    names = {path.name.split("-")[0].lower() for path in Path(here).glob("*.dist-info")}
    names -= {"pip", "setuptools"}  # of every environment
    return [f"{row['name']} {row['version']}" for row in listed if row["name"].lower().replace("-", "_") in names]


def core(folder: Path, options: list[str]) -> Path:
    environment = folder / "core"
    if not python_of(environment).exists():
        output_of(sys.executable, "-m", "venv", environment)
        install(environment, str(ROOT), options)
    return environment


def with_extra(folder: Path, base: Path, extra: str, options: list[str]) -> Path:
    environment = folder / extra
    if not python_of(environment).exists():
        output_of(sys.executable, "-m", "venv", environment)
        site = output_of(python_of(base), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        own = output_of(python_of(environment), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        (Path(own) / "core.pth").write_text(site + "\n")
        install(environment, f"opd-ds[{extra}]", options)
    return environment


def probe(environment: Path, name: str, folder: Path) -> Report:
    command = [str(python_of(environment)), str(Path(__file__).with_name("probe.py")), name, str(folder)]
    nowhere = {"OPD_DS_WEIGHTS": str(folder / "none"), "HF_HOME": str(folder / "none"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | nowhere)
    if done.returncode != 0:
        return {"imports": f"NO: {done.stderr.strip().splitlines()[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, extra: str | None, added: list[str], report: Report, without: Report) -> list[str]:
    said = report.get("check", "").partition("; ")[0]
    return [
        f"`{name}`",
        f"`{extra}`: {', '.join(added)}" if extra else "core",
        report["imports"],
        report.get("scores", "-"),
        report.get("refuses", "-"),
        said or "-",
        without.get("check", "").partition(": ")[2] or "-",
    ]


def bench(folder: Path, constraints: Iterable[str], say: Callable[[str], None]) -> str:
    """The table.

    Args:
        folder: where the environments are made.
        constraints: of pip.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "constraints.txt").write_text("\n".join(constraints) + "\n")
    pip = ["--constraint", str(folder / "constraints.txt")]
    base = core(folder, pip)
    rows = []
    for reward in json.loads(output_of(python_of(base), "-m", "opd_ds.cli", "rewards", "list", "--json")):
        name, extra = reward["name"], reward.get("extra")
        environment = with_extra(folder, base, extra, pip) if extra else base
        place = folder / "files" / name
        place.mkdir(parents=True, exist_ok=True)
        without = probe(base, name, place) if extra else {}
        added = packages(environment) if extra else []
        rows.append(row(name, extra, added, probe(environment, name, place), without))
        say(", ".join(rows[-1]))
    return markdown_table(_HEAD, rows, len(_HEAD))
