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
if ! command -v pdsh >/dev/null || ! command -v ssh >/dev/null; then
  echo "error: deepspeed reaches other hosts by ssh and pdsh, and one of them is not on this machine;" \
    "install both (Debian: apt-get install openssh-client pdsh)" >&2
  exit 2
fi
source "$(dirname "$0")/setup.sh"
run=$(from_caller "${2:?$usage}")
away=
for host in $(grep -oE '^[^#[:space:]]+' "$hostfile"); do
  ssh -o BatchMode=yes -o ConnectTimeout=15 "$host" true </dev/null 2>/dev/null || away+=" $host"
done
if [ -n "$away" ]; then  # a host may come back, so launch/until_done.sh tries again
  echo "error: no ssh without a password from $(hostname) to:$away; set up keys for them, wait until" \
    "they are up, or take them out of $hostfile" >&2
  exit 3
fi
# ssh to a host that is gone would wait for hours when all ranks have long ended.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=5 -o ServerAliveCountMax=6"
exec deepspeed --hostfile "$hostfile" --module trainer "$run" "${@:3}"
