#!/bin/sh
# Starts one run on several slices made together by one queued resource; otherwise as train_tpu_pod.sh:
#   SLICES="my-pod-0 my-pod-1" ZONE=us-east5-b WORKDIR=/mnt/shared/runs/flexattn-7b scripts/train_multislice.sh ...
# Every host learns of the other slices from the MEGASCALE_ variables that the queued resource gives it.
set -eu
: "${SLICES:?names of the slices}" "${ZONE:?their zone}" "${WORKDIR:?a folder that all hosts share}"
count=$(echo "$SLICES" | wc -w)
here=$(dirname "$0")
started=""
for slice in $SLICES; do
    TPU=$slice "$here/train_tpu_pod.sh" --config.partition.slice="$count" "$@" &
    started="$started $!"
done
status=0
for process in $started; do
    wait "$process" || status=1
done
exit $status
