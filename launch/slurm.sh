#!/usr/bin/env bash
# Slurm: sbatch --nodes 8 --gpus-per-node 8 launch/slurm.sh RUN.yaml [key=value ...]
# Slurm's warning before the time limit saves and exits; the job then puts itself back in the queue.
#SBATCH --ntasks-per-node=1
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch from the repository root}"
source launch/setup.sh
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" \
  -m trainer "$@" | tee "slurm-$SLURM_JOB_ID-last.txt"
if grep -q "^stopped at step" "slurm-$SLURM_JOB_ID-last.txt"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
