#!/usr/bin/env bash
# Start a command again until it has finished: bash launch/until_done.sh TIMES COMMAND ...
#   bash launch/until_done.sh 20 bash launch/multinode.sh hosts.txt RUN.yaml
# Exit code 0 is a run that finished, or was stopped and has saved; 2 is a mistake that a start anew
# would meet again. Anything else (3: a rank was lost or hangs) starts it again, TIMES times at most.
set -uo pipefail
usage="bash launch/until_done.sh TIMES COMMAND ..."
times=${1:?$usage}
shift
[[ $times =~ ^[0-9]+$ && $# -gt 0 ]] || { echo "error: $usage" >&2; exit 2; }
asked=
job=
trap 'asked=yes; [ -z "$job" ] || kill -TERM "$job" 2>/dev/null' TERM INT USR1
for ((attempt = 0; ; attempt++)); do
  "$@" &
  job=$!
  wait "$job"
  status=$?
  while kill -0 "$job" 2>/dev/null; do
    wait "$job"
    status=$?
  done
  if [ $status -eq 0 ] || [ $status -eq 2 ] || [ -n "$asked" ]; then
    exit $status
  fi
  if [ $attempt -ge "$times" ]; then
    echo "error: ended with code $status for the $((attempt + 1))th time; giving up" >&2
    exit $status
  fi
  echo "ended with code $status; start $((attempt + 2)) of at most $((times + 1))" >&2
  sleep "${PAUSE_SECONDS:-10}" || true
done
