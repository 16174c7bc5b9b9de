# shellcheck shell=bash
# Sourced by the scripts beside it.

# wait_until_done PID CHECK...: wait for a launcher; its exit code, or 76 where that is 0 although CHECK finds that the
# run has not made its --done-file: a library has ended the ranks, or something has killed the launcher's own processes
# (the deepspeed launcher, 0.19, then ends with 0).
wait_until_done() {
  local child=$1 code=0
  shift
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done  # a trapped signal ends a wait
  wait "$child" || code=$?
  if [ "$code" -eq 0 ] && ! "$@"; then
    echo "the launcher ended with 0, but the run did not say that it is done: exit code 76" >&2
    code=76
  fi
  return "$code"
}
