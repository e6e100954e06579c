# Sourced after setup.sh: LAUNCH starts one process per GPU, or two where there is none.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=$((gpus > 0 ? gpus : 2))
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
LAUNCH=(deepspeed --num_gpus "$processes")
