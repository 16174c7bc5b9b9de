#!/usr/bin/env bash
# The main job from nothing: environment, package, then three teachers into one student under DeepSpeed ZeRO-3 on two
# processes. What follows the script's name goes to `opd-ds train`, for example: --set run.rounds=20
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/environment.sh
install_package "[plots]"

processes=${PROCESSES:-2}
resume=auto  # started again after an interruption, the run resumes
exec deepspeed --log_level error --num_accelerators "$processes" --module opd_ds.cli train --recipe miniature --resume "$resume" "$@"
