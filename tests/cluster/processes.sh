# Sourced by up.sh and down.sh, after BASE is set: processes by pid and start time, so that no other process that has
# come to the same pid is ever taken for one of ours.

start_time() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
record() { echo "$2 $(start_time "$2")" >"$BASE/pids/$1"; }  # NAME PID
lives() {  # NAME
  local pid started
  read -r pid started 2>/dev/null <"$BASE/pids/$1" || return 1
  [ "$(start_time "$pid")" = "$started" ] && [ "$(sed 's/^.*) //' "/proc/$pid/stat" 2>/dev/null | cut -d' ' -f1)" != Z ]
}
wait_until() {  # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.1
  done
}
