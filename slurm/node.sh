#!/usr/bin/env bash
# torchrun of one node; srun starts it on every node:
#   node.sh PROCESSES LOGS PYTHON RANK.SH CONFIG.yaml [section.key=value ...]
set -euo pipefail
# Ignore signals here; the ranks install their own handlers. USR1 would kill torchrun, and on TERM torchrun would kill
# the ranks while they save.
trap '' USR1 TERM
processes=$1 logs=$2 python=$3 rank=$4
shift 4
exec "$python" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" \
    --nproc-per-node="$processes" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
    --no-python bash "$rank" "$logs" "$python" -m megalong train "$@"
