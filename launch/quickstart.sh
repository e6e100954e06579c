#!/usr/bin/env bash
# From a clone to a trained, evaluated and exported model on real image-text pairs.
# Run it again at any time: every part goes on where it stopped, and says when it is done.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
source launch/processes.sh

run=launch/runs/quickstart.yaml
workdir=runs/quickstart
zero=ds_configs/zero3.json
# On a processor that multiplies bfloat16 a step takes a quarter less; elsewhere it would take longer.
if python -c 'import sys, torch
has = torch.cpu.get_capabilities().get
sys.exit(not (has("avx512_bf16") or has("amx_bf16")))'; then
  zero=ds_configs/zero3_bf16.json
fi

echo "1/4 corpus"
python tools/make_corpus.py --out data/open --cache cache/wheels
echo "2/4 training: $processes processes, $OMP_NUM_THREADS threads each, $zero"
[ "$gpus" -gt 0 ] || python -m trainer "$run" "deepspeed=$zero" "$@" --plan short "world_size=$processes" card=cpu
launch "$run" "deepspeed=$zero" "$@"
echo "3/4 export and pictures"
python tools/export.py "$workdir"
python tools/pictures.py "$workdir"
echo "4/4 result"
python tools/evaluate.py "$workdir" --table
