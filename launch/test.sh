#!/usr/bin/env bash
# Lint, types and tests; `--slow` adds the long cases. Other arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"

markers="not slow and not gpu"
if [ "${1:-}" = --slow ]; then
  markers="not gpu"
  shift
fi
ruff format --check .
ruff check .
mypy
OMP_NUM_THREADS=1 python -m pytest -m "$markers" "$@"
