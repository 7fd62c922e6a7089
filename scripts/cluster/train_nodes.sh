#!/bin/bash
# Train a head on several machines without a cluster manager. Run on each of them:
#
#     NODES=4 NODE=0 FIRST=10.0.0.1:29500 scripts/cluster/train_nodes.sh RECIPE [key=value ...]
#
# NODES: number of machines. NODE: index of this one, from 0. FIRST: address and a free port of
# machine 0. GPUS: processes per machine (default: one per GPU). A stopped run resumes when all are
# started again.
set -euo pipefail

# Seconds that a process may take to save when it is asked to stop.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "${GPUS:-gpu}" \
    --master-addr "${FIRST%:*}" --master-port "${FIRST##*:}" \
    -m headstart.scripts.cli train "$@" train.resume=auto
