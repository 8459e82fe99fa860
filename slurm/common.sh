# Common part of this folder's jobs; sourced after `set -euo pipefail`, in the folder that paths are relative to.
# shellcheck shell=bash
#
#   sbatch ─▶ this shell ─ srun ─▶ node.sh on each node ─ torchrun ─▶ rank.sh for each rank ─▶ megalong train
#                 ▲ USR1 before the time limit (--signal=B:USR1@…), TERM from preemption, requeue and cancel
#
# The shell passes a signal on to the ranks, which save, write RUN/REQUEUE and exit 0. Only then is the job requeued.
# Nothing else is needed to restart: the same command resumes.

slurm_folder=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# The virtual environment belongs to this machine; a container has its own Python.
if [ -n "${MEGALONG_PYTHON:-}" ]; then
    python=$MEGALONG_PYTHON
elif [ -n "${CONTAINER:-}" ]; then
    python=python3
else
    python="${VIRTUAL_ENV:-$SLURM_SUBMIT_DIR/.venv}/bin/python"
fi
# Always run the code of this file's checkout: not another one that is installed in the environment, and not one in the
# working folder (where `python -m` would look first).
checkout=$(dirname -- "$slurm_folder")
if [ -f "$checkout/megalong/__init__.py" ]; then export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}"; fi
export PYTHONSAFEPATH=1

# GPUS_PER_NODE=0 trains on CPUs; torchrun then starts PROCESSES_PER_NODE processes on a node.
gpus_per_node="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
if [ "$gpus_per_node" -gt 0 ]; then
    processes_per_node="$gpus_per_node"
else
    processes_per_node="${PROCESSES_PER_NODE:-1}"
fi

# Arguments of srun's container plugin (pyxis), which starts the tasks in an image; empty without CONTAINER.
container=()
if [ -n "${CONTAINER:-}" ]; then
    container=(--container-image="$CONTAINER")
    if [ -n "${CONTAINER_MOUNTS:-}" ]; then container+=(--container-mounts="$CONTAINER_MOUNTS"); fi
    # An image has its own working folder, but paths of a configuration are relative to this folder.
    IFS=, read -r -a mounts <<<"${CONTAINER_MOUNTS:-}"
    for mount in "${mounts[@]}"; do
        IFS=: read -r outside inside _ <<<"$mount"
        case "$PWD/" in "${outside%/}"/*) container+=(--container-workdir="${inside:-$outside}${PWD#"${outside%/}"}") && break ;; esac
    done
fi

# Only problems: at INFO, 256 processes write more than anyone reads.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# 4 us * 2^22 = 17 s before InfiniBand gives up on a packet: a rerouting switch must not end a run of hours.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
# NVLink SHARP needs buffers for every communicator; tensor, context, pipeline and data parallelism have many, and at a
# million tokens the memory is worth more than a faster all-reduce.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"
# If a rank is lost, the others must end within the process group's time-out and dump what they were waiting for.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# Free a collective's tensors when it has been waited for; the allocator's own bookkeeping would keep them longer.
export TORCH_NCCL_AVOID_RECORD_STREAMS="${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}"
# One hardware queue keeps kernels in launch order, so tensor-parallel communication starts before the matrix product
# that overlaps it. Each process would also set this itself, like the allocator's settings, whose name depends on the
# version of torch (megalong/runtime/gpus.py).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Transformer Engine logs the reason for its attention kernel only on request; 0 keeps 256 ranks quiet.
export NVTE_DEBUG="${NVTE_DEBUG:-0}"
# 0 would make runs bit-exact, but on Hopper it disables Transformer Engine's fused attention for documents.
export NVTE_ALLOW_NONDETERMINISTIC_ALGO="${NVTE_ALLOW_NONDETERMINISTIC_ALGO:-1}"
# By default every process starts a thread for each core of the node. At least one, if processes outnumber cores.
threads=$((${SLURM_CPUS_PER_TASK:-64} / processes_per_node))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
# Python buffers output to a file; the last lines of a killed rank would be lost.
export PYTHONUNBUFFERED=1
# Let torchrun ignore the signals that end a job, because the ranks save then and torchrun would kill them after 30 s.
# (Older versions of torch do not read this.)
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGQUIT}"

say() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }

# Check every stage of a configuration for this job's number of processes; then preflight, training, requeue.
#   train_on_nodes CONFIG.yaml [section.key=value ...]
train_on_nodes() {
    local assignments run_dir
    local -a run_dirs
    # Quoted assignments of run_dir, run_dirs and preflight; a mistake ends the job here with one line.
    assignments=$(on_first_node "$python" -m megalong.slurm.job "$((SLURM_JOB_NUM_NODES * processes_per_node))" "$@")
    eval "$assignments"
    logs="$run_dir/logs/$SLURM_JOB_ID"
    mkdir -p -- "$logs"
    find_nodes
    say "run $run_dir, start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID: $SLURM_JOB_NUM_NODES nodes x" \
        "$processes_per_node processes, first $MASTER_ADDR:$MASTER_PORT; logs: $logs"
    trap 'pass_on USR1' USR1
    trap 'pass_on TERM' TERM
    if [ "$preflight" = true ] && [ "${PREFLIGHT:-1}" != 0 ]; then
        run_step preflight_step "$@" || end_job "preflight failed${reminder:+ (a signal came)}: nothing was started" "$status"
    fi
    run_step training_step "$@" || end_job "training ended with status $status; the end of $logs/rank-0.log:" "$status"
    requeue_where_asked
}

# Run a command on this node, which is the first one; in the container if there is one, because Python and paths are
# those of the container. This is also the only check that the container shows this checkout.
on_first_node() {
    if [ ${#container[@]} -eq 0 ]; then
        "$@"
        return
    fi
    # shellcheck disable=SC2016
    srun --nodes=1 --ntasks=1 "${container[@]}" bash -c '
        if [ ! -e "$0" ]; then
            echo "megalong: error: slurm.container_mounts: the container does not show $0; mount its folder" >&2
            exit 2
        fi
        exec "$@"' "$slurm_folder/node.sh" "$@"
}

find_nodes() {
    local first
    MEGALONG_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
    first=${MEGALONG_NODES%% *}
    # The others connect to the first node by its name or, if that does not resolve, by the address that SLURM uses.
    if [ -z "${MASTER_ADDR:-}" ]; then
        MASTER_ADDR=$first
        if ! getent hosts "$first" >/dev/null; then
            MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' || true)
        fi
        MASTER_ADDR=${MASTER_ADDR:-$first}
    fi
    # Different ports for jobs that share a node.
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    export MEGALONG_NODES MASTER_ADDR MASTER_PORT
}

# srun no longer inherits --cpus-per-task from the job, and one lost node must end the others.
srun_on_nodes() {
    srun --nodes="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 "${container[@]}" "$@"
}

# One task per rank, without torchrun: without a rendezvous, a node that does not answer can be named.
preflight_step() {
    local cpus=$((${SLURM_CPUS_PER_TASK:-64} / processes_per_node))
    MASTER_PORT=$((MASTER_PORT + 1)) srun_on_nodes --ntasks-per-node="$processes_per_node" --overcommit \
        --ntasks=$((SLURM_JOB_NUM_NODES * processes_per_node)) --cpus-per-task=$((cpus > 0 ? cpus : 1)) \
        "$python" -m megalong preflight "$@"
}

# Ranks follow SLURM's node order, which follows the network's topology. A requeued job keeps its number and appends to
# its logs. srun would read a % in the path as a placeholder.
training_step() {
    srun_on_nodes --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-64}" \
        --output="${logs//%/%%}/node-%n.log" --open-mode=append \
        bash "$slurm_folder/node.sh" "$processes_per_node" "$logs" "$python" "$slurm_folder/rank.sh" "$@"
}

# Run a step in the background, so that this shell can handle signals, and wait for its end; sets `status`.
run_step() {
    local step result
    "$@" &
    step=$!
    status=0
    while :; do
        interrupted=""
        result=0
        wait "$step" || result=$?
        # 127: the last wait already returned the status, and a signal came in between.
        if [ "$result" -ne 127 ]; then status=$result; fi
        if [ -z "$interrupted" ] || [ "$result" -eq 127 ]; then break; fi
    done
    if [ -n "${reminder:-}" ]; then kill "$reminder" 2>/dev/null || true; fi
    return "$status"
}

# Pass SLURM's signal on to the ranks. Repeatedly, because a rank that is still starting has no handler yet.
pass_on() {
    interrupted=1
    say "SIG$1: the ranks save and exit"
    if [ -n "${reminder:-}" ]; then return; fi
    (
        # If SLURM is ending the job already, the ranks got the signal from SLURM.
        while scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null; do sleep 10; done
    ) &
    reminder=$!
}

end_job() {
    say "$1"
    if [ -e "$logs/rank-0.log" ] && [[ $1 == training* ]]; then tail -n 12 -- "$logs/rank-0.log"; fi
    exit "$2"
}

requeue_where_asked() {
    local dir marker=""
    for dir in "${run_dirs[@]}"; do
        if [ -e "$dir/REQUEUE" ]; then marker="$dir/REQUEUE"; fi
    done
    if [ -z "$marker" ]; then
        say "done"
        return
    fi
    # The job may have been cancelled, or requeued by SLURM or by hand; requeue it only if it still runs.
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then
        say "saved; SLURM is ending this job itself"
        return
    fi
    # Otherwise a job with too little time for one step and a save would be requeued for ever.
    if [ -e "$logs/requeued-at" ] && same_step "$marker" "$logs/requeued-at"; then
        say "no step was done since the last requeue, so this job is not requeued: give it more --time, or a shorter" \
            "slurm.lead_minutes"
        exit 1
    fi
    cp -- "$marker" "$logs/requeued-at"
    say "saved; requeued"
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "this cluster does not requeue jobs: submit the same job again, it resumes from the last save"
        exit 1
    fi
}

same_step() {
    [ "$(grep -o '"step": *[0-9]*' "$1")" = "$(grep -o '"step": *[0-9]*' "$2")" ]
}
