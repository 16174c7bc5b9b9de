#!/usr/bin/env bash
# Install what the tests need and run them. What follows the script's name goes to pytest, for example: -k kernels
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/environment.sh
install_package "[dev]"

if [ $# -eq 0 ]; then set -- -m "not slow"; fi
exec python -m pytest "$@"
