#!/usr/bin/env bash
# A study as a Slurm array: sbatch --array 1-8 --gpus-per-node 8 launch/slurm_array.sh STUDY.yaml
# Each task trains its part of the cells, with the study's `launcher` (such as [torchrun,
# --nproc_per_node, "8", -m]), and says so in slurm-JOB_TASK.out. `python tools/scaling.py show
# STUDY.yaml` shows all tasks in one table. Slurm's warning before the time limit makes the cell that
# trains save and stop; the task then puts itself back in the queue, as launch/slurm.sh does.
#SBATCH --ntasks-per-node=1
#SBATCH --nodes=1
#SBATCH --output=slurm-%A_%a.out
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch from the repository root}"
source launch/setup.sh
log="slurm-$SLURM_JOB_ID-last.txt"
trap : TERM USR1 INT

status=0
srun --kill-on-bad-exit=1 python tools/scaling.py sweep "$@" |
  (trap '' TERM USR1 INT; exec tee "$log") || status=$?
if grep -q "^stopped with" "$log" &&
  ! scontrol show job "$SLURM_JOB_ID" | grep -q "JobState=CANCELLED"; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
