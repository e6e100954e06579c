#!/usr/bin/env bash
# Lint, types and tests, on two processes. Other arguments go to pytest.
#   --slow     the long cases too
#   --fast     no test that starts processes, and none that is marked heavy; no lint, no types
#   --changed  tests that import, at whatever distance, what differs from main
set -euo pipefail
source "$(dirname "$0")/setup.sh"

markers="not slow and not gpu" lint=yes
options=()
while [[ "${1:-}" =~ ^--(slow|fast|changed)$ ]]; do
  case "$1" in
    --slow) markers="not gpu" ;;
    --fast) lint=no options+=(--fast) ;;
    --changed) options+=(--changed) ;;
  esac
  shift
done
if [ $lint = yes ]; then
  ruff format --check .
  ruff check .
  mypy
fi
# A module's tests share what is costly to make, so they stay in one process.
OMP_NUM_THREADS=1 python -m pytest -m "$markers" -n 2 --dist loadfile "${options[@]}" "$@"
