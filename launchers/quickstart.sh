#!/usr/bin/env bash
# The main job from nothing: environment, package, then three teachers into one student under DeepSpeed ZeRO-3 on two
# processes. What follows the script's name goes to `opd-ds train`, for example: --set run.rounds=20
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/environment.sh
install_package "[plots]"

# Started again after an interruption, the run resumes.
PROCESSES=${PROCESSES:-2} exec bash launchers/single_node.sh --recipe miniature "$@"
