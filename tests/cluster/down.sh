#!/usr/bin/env bash
# Stop what up.sh started in BASE, and nothing else. Logs and configuration stay for a look.
set -euo pipefail
BASE=${BASE:-${TMPDIR:-/tmp}/opd-ds-cluster}
# shellcheck source=tests/cluster/processes.sh
. "$(cd "$(dirname "$0")" && pwd)/processes.sh"

stopped() { ! lives "$1"; }
for file in "$BASE"/pids/*; do
  [ -e "$file" ] || continue
  name=$(basename "$file")
  if lives "$name"; then
    read -r pid _ <"$file"
    # Process 1 of a namespace takes everything in it along, and does not mind TERM.
    if [ "$name" = munged ]; then kill -TERM "$pid"; else kill -KILL "$pid"; fi
    wait_until 10 stopped "$name"
  fi
  rm -f "$file"
done
rm -f "$BASE/shape"
