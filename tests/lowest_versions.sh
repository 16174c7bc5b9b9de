#!/usr/bin/env bash
# The default tests on the lowest versions that setup.cfg allows, of Python too. What follows the script's name goes to
# pytest instead. Outside .ci/run: on a machine without a CPU build of the old torch, pip's default is a CUDA build of
# several GB. The environment is kept in .venv-lowest, or where LOWEST_VENV says; PYTHON names an interpreter of the lowest
# version where uv finds none.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${LOWEST_VENV:-.venv-lowest}"
python=$(sed -n 's/^python_requires = >=\([0-9.]*\).*/\1/p' setup.cfg)

if [ ! -f "$folder/setup.cfg" ] || ! cmp -s setup.cfg "$folder/setup.cfg"; then
  python3 -m venv "$folder/uv"
  "$folder/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv
  uv="$folder/uv/bin/uv"
  "$uv" venv --quiet --clear --python "${PYTHON:-$python}" "$folder/env"
  # What a dependency needs in turn is as new as it may be: its own lower bounds are not ours to test.
  VIRTUAL_ENV="$folder/env" "$uv" pip install --compile-bytecode --resolution lowest-direct --editable ".[dev]"
  cp setup.cfg "$folder/env/.opd_ds_installeddev"  # launchers/test.sh is not to install anything newer
  cp setup.cfg "$folder/setup.cfg"
fi
# shellcheck disable=SC1091
. "$folder/env/bin/activate"
bash launchers/test.sh "$@"
