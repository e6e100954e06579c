#!/usr/bin/env bash
# From shards to a model that was trained on clusters of its own images, on any number of processes:
# index -> embed with a frozen teacher -> cluster -> train -> evaluate.
#   bash launch/pipeline.sh [RUN.yaml key=value ...]
# Run it again at any time: every part goes on where it stopped, and what is done is not done again.
# TEACHER, CLUSTERS, CLASSES and SHARDS (braces allowed) change the parts before training; the run's
# YAML names the shards to train on, and is given the folder of the clusters.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
source launch/processes.sh

teacher=${TEACHER:-efficientnet-lite0}
clusters=${CLUSTERS:-256}
classes=${CLASSES:-subgroup}
shards=${SHARDS:-'data/open/train-{000000..000002}.tar'}
run=${1:-launch/runs/mlcd_tiny.yaml}
[ $# -eq 0 ] || shift
store=cache/embeddings/$teacher
name=$(basename "$run" .yaml)
labels=runs/clusters-$teacher-$clusters
workdir=runs/$name-$teacher-$clusters

spread() { torchrun --standalone --nproc-per-node "$processes" "$@"; }

echo "1/5 index: $shards"
if [ ! -d data/open ] && [ -z "${SHARDS:-}" ]; then
  python tools/make_corpus.py --out data/open --cache cache/wheels
fi
python tools/index.py --missing "$shards"
echo "2/5 embed: $teacher"
spread tools/embed.py --teacher "$teacher" --data "$shards" --out "$store"
echo "3/5 cluster: $clusters"
spread tools/cluster.py "$store" --clusters "$clusters" --spherical --init hierarchical \
  --out "$labels" --images "$shards" --classes "$classes"
echo "4/5 training: $processes processes, $OMP_NUM_THREADS threads each"
launch "$run" "recipe.labels=$labels" "workdir=$workdir" "save_every=2 min" "$@"
echo "5/5 result"
python tools/evaluate.py "$workdir" --table
