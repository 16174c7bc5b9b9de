#!/usr/bin/env bash
# What people install: builds the source distribution and, from that, the wheel; installs the wheel in an environment
# beside the active one, whose packages it sees; and runs the main job from an empty folder outside the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/environment.sh
install_package "[dev]"
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT

python -m build --outdir "$there/dist" . >"$there/build.log" 2>&1 || { cat "$there/build.log"; exit 1; }
python -m venv "$there/venv"
# A line of a .pth file adds a folder and reads none of its own .pth files: not those of the editable install either.
python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$("$there/venv/bin/python" -c \
  'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_the_active_environment.pth"
"$there/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$there"/dist/*.whl

mkdir "$there/empty"
cd "$there/empty"
unset PYTHONPATH
export VIRTUAL_ENV="$there/venv" PATH="$there/venv/bin:$PATH"
python -c 'import opd_ds, sys; assert opd_ds.__file__.startswith(sys.prefix), opd_ds.__file__'
opd-ds recipes >/dev/null
opd-ds launch --help >/dev/null
# The deepspeed command of the active environment would start the active environment's Python.
python -m deepspeed.launcher.runner --num_accelerators 2 --module opd_ds.cli \
  train --recipe miniature --set run.rounds=2 --set evaluation.baselines=false
ls runs/miniature/export >/dev/null
echo "the wheel works outside the checkout: $(ls "$there/dist")"
