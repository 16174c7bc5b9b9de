#!/usr/bin/env bash
# The tests that need the extras `quantization` and `adamw8bit`. They are no part of `dev`: where torchao is installed
# diffusers imports it, and every process starts seconds later. So they go into a folder of their own. What follows the
# script's name goes to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/environment.sh
install_package "[dev]"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mapfile -t packages < <(python - <<'PYTHON'
from configparser import ConfigParser

settings = ConfigParser()
settings.read("setup.cfg")
for extra in ("quantization", "adamw8bit"):
    print(settings["options.extras_require"][extra].strip())
PYTHON
)
python -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "${packages[@]}"
PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" python -m pytest -q tests/test_quantization.py tests/test_lean_optimizers.py "$@"
