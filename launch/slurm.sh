#!/usr/bin/env bash
# Slurm: sbatch --nodes 8 --gpus-per-node 8 launch/slurm.sh RUN.yaml [key=value ...]
# Slurm's warning before the time limit makes the ranks save and stop; the job then puts itself back
# in the queue. So does a job that is told to end, unless somebody has cancelled it.
#SBATCH --ntasks-per-node=1
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch from the repository root}"
source launch/setup.sh
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
log="slurm-$SLURM_JOB_ID-last.txt"
# This shell stays until the ranks have saved: a trap runs when the command before it has ended.
trap : TERM USR1 INT

status=0
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" \
  -m trainer "$@" | (trap '' TERM USR1 INT; exec tee "$log") || status=$?
# torchrun's own status after a signal is not 0; what the ranks have said counts.
if grep -q "^stopped at step" "$log"; then
  if scontrol show job "$SLURM_JOB_ID" | grep -q "JobState=CANCELLED"; then
    exit 0
  fi
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
