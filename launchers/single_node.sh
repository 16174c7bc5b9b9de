#!/usr/bin/env bash
# Train on this machine under the deepspeed launcher. What follows the script's name goes to `opd-ds train`:
#     launchers/single_node.sh --recipe mopd_sd35m
# TERM and Ctrl-C save the state and leave; USR1 saves it and leaves with exit code 75.
set -euo pipefail

# PROCESSES     how many; default: one per GPU that is visible, or 1 without a GPU
# MASTER_PORT   default: a free port

if ! command -v opd-ds >/dev/null && [ -f .venv/bin/activate ]; then
  # shellcheck disable=SC1091
  . .venv/bin/activate
fi
gpus=0
if [ -z "${PROCESSES:-}" ]; then
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  # With a number the deepspeed launcher would not look at CUDA_VISIBLE_DEVICES.
  if [ "$gpus" -eq 0 ]; then PROCESSES=1; fi
fi
# Unlike torchrun the deepspeed launcher leaves every process all cores.
share=$(($(nproc) / ${PROCESSES:-$gpus}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}

# shellcheck source=launchers/wait_until_done.sh
. "$(dirname "$0")/wait_until_done.sh"
done_file=$(mktemp -u)
port=${MASTER_PORT:-$(python -m opd_ds.cluster.rendezvous)}
trap 'rm -f "$done_file"' EXIT
trap '' USR1  # is for the ranks, which install their own handler; the launcher would die of it
trap : INT    # Ctrl-C reaches all processes by itself
child=''
# The front process of the launcher (0.19) does not hand TERM on; the one behind it does, and gives the ranks 30 s.
trap '[ -z "$child" ] || pkill -TERM -P "$child" || true' TERM
deepspeed --log_level error ${PROCESSES:+--num_accelerators "$PROCESSES"} --master_port "$port" \
  --module opd_ds.cli train --resume auto --done-file "$done_file" "$@" &
child=$!
wait_until_done "$child" test -e "$done_file"
