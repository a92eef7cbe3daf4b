#!/bin/bash
# A run under Slurm, on as many nodes as are asked for: one process a node, with all its GPUs.
#
#   sbatch --nodes=2 launch/slurm.sh --config=recipes/configs/llama8b.py --config.directory=/shared/run
#
# All nodes must see the directory. When time is nearly up, or the job makes way for another, every
# process is asked to stop: it saves and exits with status 75, and the job goes back into the queue.
# After an error it is tried again three times, after a wrong command (2) never.
#SBATCH --job-name=dpo
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

# Unless it is told which, jax takes one GPU for each task.
if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# The first task that fails ends the others, which would wait for it.
srun --kill-on-bad-exit=1 --label "${PYTHON:-.venv/bin/python}" "${RECIPE:-recipes/dpo.py}" \
  --config.distributed.enabled --config.mesh.data=-1 --config.mesh.fsdp="${SLURM_GPUS_ON_NODE:-1}" \
  --config.require_accelerator --config.minutes_per_checkpoint=15 --config.hang_minutes=30 "$@"
status=$?

errors=slurm-$SLURM_JOB_ID.errors
case $status in
  0) echo "finished" ;;
  2) echo "wrong command: not tried again" ;;
  75) echo "more to do: back into the queue" && scontrol requeue "$SLURM_JOB_ID" ;;
  *)
    echo "status $status at $(date)" >> "$errors"
    if [ "$(wc -l < "$errors")" -le 3 ]; then
      echo "error, noted in $errors: tried again" && scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit $status
