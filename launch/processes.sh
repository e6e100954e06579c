# Sourced after setup.sh: `launch RUN.yaml ...` starts one process per GPU, or two where there is none.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=$((gpus > 0 ? gpus : 2))
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu
export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))

launch() {
  local port job status=0
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  # DeepSpeed's runner dies of a SIGTERM without passing it on. So it gets a process group of its
  # own, the whole group is told, and we wait until the ranks have saved.
  set -m
  deepspeed --log_level error --num_gpus "$processes" --master_port "$port" --module trainer "$@" &
  job=$!
  set +m
  trap 'kill -TERM -- "-$job" 2>/dev/null' TERM INT USR1
  wait "$job" || status=$?
  while kill -0 -- "-$job" 2>/dev/null; do sleep 0.2 || true; done
  trap - TERM INT USR1
  return "$status"
}
