#!/bin/bash
# A run on the hosts of a TPU pod, or of several slices of one queued resource, by ssh.
#
#   launch/tpu_vm.sh NAME ZONE --config=recipes/configs/llama8b.py --config.directory=gs://bucket/run
#
# Every host has this folder as ~/nnx-zoo, with its .venv (BUILD.md). Hosts find each other, and who
# they are, by the pod's metadata. The run goes on without this terminal, and a host starts its process
# again until it is done; its lines are in ~/nnx-zoo/run.log.
set -eu
name=$1 zone=$2
shift 2

# What runs on each host. Status 0: finished, 2: a wrong command; otherwise all hosts start again,
# for the others end within a minute of the first.
on_host='cd ~/nnx-zoo
tries=0
until [ $tries -gt 3 ]; do
  .venv/bin/python recipes/dpo.py --config.distributed.enabled --config.mesh.data=-1 \
    --config.require_accelerator --config.minutes_per_checkpoint=15 --config.hang_minutes=30 "$@"
  status=$?
  case $status in 0 | 2) break ;; 75) ;; *) tries=$((tries + 1)) ;; esac
  sleep 120
done
echo "ended with status $status"'

# Quoted once for the shell here, and once for the one there.
words=$(printf ' %q' "$on_host" run "$@")
exec ${GCLOUD:-gcloud} compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="nohup bash -c$words >> ~/nnx-zoo/run.log 2>&1 < /dev/null &"
