#!/usr/bin/env bash
# Train under torchrun, on this machine or as one of several. What follows the script's name goes to `opd-ds train`:
#     launchers/torchrun_train.sh --recipe mopd_sd35m                                       # one machine
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=a MASTER_PORT=29500 launchers/torchrun_train.sh ...  # on machine a
#     NNODES=2 NODE_RANK=1 MASTER_ADDR=a MASTER_PORT=29500 launchers/torchrun_train.sh ...  # on machine b
#     srun --ntasks-per-node=1 launchers/torchrun_train.sh --recipe mopd_sd35m              # in a SLURM allocation
# USR1 makes the ranks save their state and leave; torchrun's own exit code is then 1, like after any rank's failure.
set -euo pipefail

# PROCESSES     on this machine; default: one per GPU, or 1 without a GPU
# The following come from SLURM under srun:
# NNODES        machines, default 1
# NODE_RANK     of this machine, default 0
# MASTER_ADDR   the machine with NODE_RANK 0, default this one
# MASTER_PORT   the same free port on all; default: chosen here, good for one machine and for an allocation's nodes

if ! command -v opd-ds >/dev/null && [ -f .venv/bin/activate ]; then
  # shellcheck disable=SC1091
  . .venv/bin/activate
fi
nodes=${NNODES:-${SLURM_STEP_NUM_NODES:-1}}
rank=${NODE_RANK:-${SLURM_NODEID:-0}}
if [ -n "${SLURM_STEP_NODELIST:-}" ]; then
  first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
fi
host=${MASTER_ADDR:-${first:-127.0.0.1}}
if [ "$nodes" -gt 1 ] && [ "$host" = 127.0.0.1 ]; then
  echo "NNODES=$nodes needs MASTER_ADDR and MASTER_PORT, the same on all machines" >&2
  exit 2
fi
port=${MASTER_PORT:-$(python -m opd_ds.cluster.rendezvous)}
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}}

# shellcheck source=launchers/wait_until_done.sh
. "$(dirname "$0")/wait_until_done.sh"
done_file=$(mktemp -u)  # of this machine: the first of its ranks makes it
child=''
trap 'rm -f "$done_file"' EXIT
trap '' USR1  # is for the ranks, which install their own handler; torchrun would die of it
trap : INT    # Ctrl-C reaches all processes by itself
trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM
# A machine's own name for itself need not be the one in MASTER_ADDR: say who holds the rendezvous.
torchrun --nnodes="$nodes" --node-rank="$rank" --nproc-per-node="$processes" \
  --rdzv-backend=c10d --rdzv-endpoint="$host:$port" --rdzv-id="${SLURM_JOB_ID:-opd-ds}" \
  --rdzv-conf="is_host=$((rank == 0))" -m opd_ds.cli train --resume auto --done-file "$done_file" "$@" &
child=$!
wait_until_done "$child" test -e "$done_file"
