#!/usr/bin/env bash
# Several machines that reach each other by ssh: bash launch/multinode.sh HOSTFILE RUN.yaml [key=value ...]
# A hostfile line is `name slots=8`. The checkout, the data and the workdir must be on a shared disk.
set -euo pipefail
hostfile=$(realpath "$1")
shift
source "$(dirname "$0")/setup.sh"
exec deepspeed --hostfile "$hostfile" --module trainer "$@"
