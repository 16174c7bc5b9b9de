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
# With a number the deepspeed launcher would not look at CUDA_VISIBLE_DEVICES.
if [ -z "${PROCESSES:-}" ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  PROCESSES=1
fi

port=${MASTER_PORT:-$(python -m opd_ds.cluster.rendezvous)}
trap '' USR1  # is for the ranks, which install their own handler; the launcher would die of it
exec deepspeed ${PROCESSES:+--num_accelerators "$PROCESSES"} --master_port "$port" \
  --module opd_ds.cli train --resume auto "$@"
