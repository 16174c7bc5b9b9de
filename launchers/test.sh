#!/usr/bin/env bash
# Install what the tests need and run the default ones: all but `slow` and `extended` ones, and those that need the
# miniature SLURM cluster. What follows the script's name goes to pytest instead, for example: -k kernels
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/environment.sh
install_package "[dev]"

# Two at a time, a file on one of the two, for what its tests share; long files first.
if [ $# -eq 0 ]; then
  set -- -m "not slow and not cluster and not extended" --numprocesses 2 --dist loadfile --no-loadscope-reorder
fi
exec python -m pytest "$@"
