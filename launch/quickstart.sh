#!/usr/bin/env bash
# From a clone to a trained, evaluated and exported model on real image-text pairs.
# Run it again at any time: every part goes on where it stopped, and says when it is done.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
source launch/processes.sh

run=launch/runs/quickstart.yaml
workdir=runs/quickstart

echo "1/4 corpus"
python tools/make_corpus.py --out data/open --cache cache/wheels
echo "2/4 training: $processes processes, $OMP_NUM_THREADS threads each"
launch "$run" "$@"
echo "3/4 export and pictures"
python tools/export.py "$workdir"
python tools/pictures.py "$workdir"
echo "4/4 result"
python tools/evaluate.py "$workdir" --table
