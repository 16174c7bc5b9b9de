#!/usr/bin/env bash
# Train on the machines of a hostfile (lines like `node1 slots=8`) with the deepspeed launcher over pdsh and ssh. What
# follows the hostfile goes to `opd-ds train`:
#     launchers/hostfile_train.sh hostfile --recipe mopd_sd35m
# Needs pdsh here, ssh without a password to all machines, and this folder and environment at the same place on them.
# TERM and Ctrl-C make the launcher end all ranks, which save their state; it does so with pkill, which ends every
# deepspeed launch of this user and environment on those machines. Other signals do not travel over pdsh.
set -euo pipefail

# MASTER_ADDR   the first machine as the others see it; default: its first address
# MASTER_PORT   free on the first machine; default: one that is free here
# Environment variables that go to the ranks, unless a .deepspeed_env file here, in the home folder or at DS_ENV_FILE
# says which. Nothing secret: they stand in command lines.
passed='^((DS|TORCH|TORCHINDUCTOR|TORCHDYNAMO|PYTORCH|TRITON|CUBLAS|OMP|MKL|GLOO|TRANSFORMERS)_|(HF_(HOME|HUB_CACHE|HUB_OFFLINE|ENDPOINT)|CUDA_HOME|TMPDIR)$)'

if [ $# -eq 0 ] || [ ! -f "$1" ]; then
  echo "usage: launchers/hostfile_train.sh HOSTFILE --recipe NAME ...; no such hostfile: ${1:-}" >&2
  exit 2
fi
hostfile=$1
shift
# The deepspeed launcher (0.19) shows a traceback for some of these, and ends with 0 where no host has a slot.
problem=$(awk '{ sub(/\r$/, "") }
  /^[[:space:]]*(#|$)/ { next }
  !/^[[:space:]]*[^[:space:]]+[[:space:]]+slots=0*[1-9][0-9]*([[:space:]]|$)/ { print "line " NR ": " $0; exit }
  seen[$1]++ { print "line " NR ": " $1 " is there already"; exit }
  { hosts++ }
  END { if (!hosts) print "it names no host" }' "$hostfile" | head -n 1)
if [ -n "$problem" ]; then
  echo "$hostfile, $problem; needs one line a machine, like: node1 slots=8" >&2
  exit 2
fi
hosts=$(awk '{ sub(/\r$/, "") } !/^[[:space:]]*(#|$)/ { printf "%s%s", comma, $1; comma = "," }' "$hostfile")
if ! command -v opd-ds >/dev/null && [ -f .venv/bin/activate ]; then
  # shellcheck disable=SC1091
  . .venv/bin/activate
fi
# The deepspeed launcher hands one string to the remote shells and quotes nothing in it.
for path in "$PWD" "$(command -v python)"; do
  if [[ $path =~ [^A-Za-z0-9_./=:,@+-] ]]; then
    echo "$path: pdsh needs a path of letters, digits and _./=:,@+- ; start from a folder with such a name" >&2
    exit 2
  fi
done

arguments=()
for argument in "$@"; do
  if [[ $argument =~ ^[A-Za-z0-9_./=:,@+-]+$ ]]; then
    arguments+=("$argument")
  else  # every byte by its number: nothing is left for the launcher, pdsh (%h) and the first of the shells to read
    bytes=$(printf %s "$argument" | od -An -v -to1 | tr -d '\n')
    arguments+=("\$'${bytes// /\\}'")
  fi
done

# shellcheck source=launchers/wait_until_done.sh
. "$(dirname "$0")/wait_until_done.sh"
child='' variables=''
done_file=$PWD/.opd-ds-done-$$  # on every machine: they need not share this folder
is_done() {
  pdsh -S -R ssh -w "${hosts%%,*}" test -e "$done_file" && pdsh -R ssh -w "$hosts" rm -f "$done_file"
}
trap '[ -z "$variables" ] || rm -f "$variables"' EXIT
trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT
if [ -z "${DS_ENV_FILE:-}" ] && [ ! -f .deepspeed_env ] && [ ! -f ~/.deepspeed_env ]; then
  variables=$(mktemp)
  for name in $(compgen -e); do
    value=${!name}
    if [[ $name =~ $passed && -n $value && $value != *$'\n'* ]]; then
      # The launcher puts double quotes around what is not plain; pdsh reads %.
      printf '%s=%s\n' "$name" "$(printf %s "$value" | sed 's/[\\"$`]/\\&/g; s/%/%%/g')" >>"$variables"
    fi
  done
  export DS_ENV_FILE=$variables
fi

deepspeed --log_level error --hostfile "$hostfile" --force_multi ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
  --master_port "${MASTER_PORT:-$(python -m opd_ds.cluster.rendezvous)}" \
  --module opd_ds.cli train --resume auto --done-file "$done_file" "${arguments[@]}" &
child=$!
wait_until_done "$child" is_done
