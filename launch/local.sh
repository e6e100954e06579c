#!/usr/bin/env bash
# One machine: bash launch/local.sh RUN.yaml [key=value ...]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
source launch/processes.sh
run=$(from_caller "${1:?bash launch/local.sh RUN.yaml [key=value ...]}")
launch "$run" "${@:2}"
