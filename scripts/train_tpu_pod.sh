#!/bin/sh
# Starts one run on all hosts of a TPU pod slice, from your own machine:
#   TPU=my-pod ZONE=us-east5-b WORKDIR=/mnt/shared/runs/flexattn-7b scripts/train_tpu_pod.sh --config.start.checkpoint=DIR ...
# The repository lies at $CODE on every host, with its environment at $CODE/.venv; WORKDIR is on storage that they share.
set -eu
: "${TPU:?name of the TPU}" "${ZONE:?its zone}" "${WORKDIR:?a folder that all hosts share}"
CODE=${CODE:-flexattn_jax}
quoted=""
for word in "$@"; do
    quoted="$quoted '$(printf %s "$word" | sed "s/'/'\\\\''/g")'"
done
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
    cd $CODE && JAX_COMPILATION_CACHE_DIR=\$HOME/.cache/flexattn_jax/compiled \
    .venv/bin/python train.py --config=configs/train_llava.py --workdir='$WORKDIR' $quoted"
