#!/usr/bin/env bash
# Several machines that reach each other by ssh: bash launch/multinode.sh HOSTFILE RUN.yaml [key=value ...]
# A hostfile line is `name slots=8`. The checkout, the data and the workdir must be on a shared disk.
set -euo pipefail
usage="bash launch/multinode.sh HOSTFILE RUN.yaml [key=value ...]"
hostfile=$(realpath -m "${1:?$usage}")
if ! grep -qE '^[^#[:space:]]+[[:space:]]+slots=[0-9]+' "$hostfile" 2>/dev/null; then
  echo "error: no line such as 'name slots=8' in the hostfile $hostfile, or no such file" >&2
  exit 2
fi
source "$(dirname "$0")/setup.sh"
run=$(from_caller "${2:?$usage}")
exec deepspeed --hostfile "$hostfile" --module trainer "$run" "${@:3}"
