#!/usr/bin/env bash
# Install what the tests need and run them. What follows the script's name goes to pytest, for example: -k kernels
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/environment.sh
install_package "[dev]"

# Two at a time: most tests take one core, those with several ranks wait for one another most of the time.
if [ $# -eq 0 ]; then set -- -m "not slow" --numprocesses 2 --dist loadfile; fi
exec python -m pytest "$@"
