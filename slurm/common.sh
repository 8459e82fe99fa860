# What the jobs of this folder share; sourced, after `set -euo pipefail`, from the folder that paths are relative to.
# shellcheck shell=bash
#
#   sbatch ─▶ this shell ─ srun ─▶ node.sh on each node ─ torchrun ─▶ rank.sh for each rank ─▶ megalong train
#                 ▲ USR1 before the time limit (--signal=B:USR1@…), TERM from preemption, requeue and cancel
#
# The shell passes a signal on to the ranks, which save, write RUN/REQUEUE and exit 0; then, and only then, the job is
# requeued. Restarting needs nothing else: the same command resumes.

slurm_folder=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# The virtual environment is this machine's: a container has a Python of its own.
if [ -n "${MEGALONG_PYTHON:-}" ]; then
    python=$MEGALONG_PYTHON
elif [ -n "${CONTAINER:-}" ]; then
    python=python3
else
    python="${VIRTUAL_ENV:-$SLURM_SUBMIT_DIR/.venv}/bin/python"
fi
# The code that runs is that of this file's checkout, neither another one that the environment has installed nor one
# that the job happens to run in (which `python -m` would look into first).
checkout=$(dirname -- "$slurm_folder")
if [ -f "$checkout/megalong/__init__.py" ]; then export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}"; fi
export PYTHONSAFEPATH=1

# GPUS_PER_NODE=0 trains on CPUs: PROCESSES_PER_NODE then says how many processes torchrun starts on a node.
gpus_per_node="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
if [ "$gpus_per_node" -gt 0 ]; then
    processes_per_node="$gpus_per_node"
else
    processes_per_node="${PROCESSES_PER_NODE:-1}"
fi

# Empty without CONTAINER: an image that srun's container plugin (pyxis) starts the tasks in.
container=()
if [ -n "${CONTAINER:-}" ]; then
    container=(--container-image="$CONTAINER")
    if [ -n "${CONTAINER_MOUNTS:-}" ]; then container+=(--container-mounts="$CONTAINER_MOUNTS"); fi
    # An image has a working folder of its own, and paths of a configuration are relative to this one.
    IFS=, read -r -a mounts <<<"${CONTAINER_MOUNTS:-}"
    for mount in "${mounts[@]}"; do
        IFS=: read -r outside inside _ <<<"$mount"
        case "$PWD/" in "${outside%/}"/*) container+=(--container-workdir="${inside:-$outside}${PWD#"${outside%/}"}") && break ;; esac
    done
fi

# Problems only: at INFO, 256 processes write more than anyone reads.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# 4 us * 2^22 = 17 s before InfiniBand gives a packet up: a rerouting switch must not end a run of hours.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
# NVLink SHARP keeps buffers for every communicator; tensor, context, pipeline and data parallelism make many, and at a
# million tokens the memory is worth more than a faster all-reduce.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"
# A rank that is lost must end the others within the process group's time-out, and dump what each was waiting for.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# Tensors used by a collective are freed when it is waited for; the allocator's own bookkeeping would hold them longer.
export TORCH_NCCL_AVOID_RECORD_STREAMS="${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}"
# One hardware queue keeps kernels in launch order, so that tensor-parallel communication starts before the matrix
# product that should hide it. Each process would set this itself, as it does the allocator's settings, whose name
# depends on the version of torch (megalong/runtime/gpus.py).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Transformer Engine says why it takes which attention kernel only when asked; 0 keeps 256 ranks quiet.
export NVTE_DEBUG="${NVTE_DEBUG:-0}"
# 0 would give the same bits in every run, but on Hopper it disables Transformer Engine's fused attention for documents.
export NVTE_ALLOW_NONDETERMINISTIC_ALGO="${NVTE_ALLOW_NONDETERMINISTIC_ALGO:-1}"
# Every process would otherwise start a thread for each core of the node; never none, if processes outnumber cores.
threads=$((${SLURM_CPUS_PER_TASK:-64} / processes_per_node))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
# Python holds back what it prints to a file; a killed rank would take its last lines along.
export PYTHONUNBUFFERED=1
# torchrun leaves the signals a job is ended by to the ranks, which save: it would kill them after 30 s. (Older versions
# of torch do not read this.)
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGQUIT}"

say() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }

# Every stage of a configuration checked for this job's number of processes, preflight, training, requeue.
#   train_on_nodes CONFIG.yaml [section.key=value ...]
train_on_nodes() {
    local answer run_dir
    local -a run_dirs
    # Assignments of run_dir, run_dirs and preflight, quoted; a mistake ends the job here with its one line.
    answer=$(on_first_node "$python" -m megalong.slurm.job "$((SLURM_JOB_NUM_NODES * processes_per_node))" "$@")
    eval "$answer"
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

# Here, which is the first node; in the container where there is one, whose Python and paths they are. There is no
# other check that it shows this checkout.
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
    # The first node answers the others: by its name, or where that resolves to nothing as SLURM itself reaches it.
    if [ -z "${MASTER_ADDR:-}" ]; then
        MASTER_ADDR=$first
        if ! getent hosts "$first" >/dev/null; then
            MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' || true)
        fi
        MASTER_ADDR=${MASTER_ADDR:-$first}
    fi
    # Jobs that share a node differ in their port.
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    export MEGALONG_NODES MASTER_ADDR MASTER_PORT
}

# srun no longer takes --cpus-per-task from the job by itself, and one lost node must end the others.
srun_on_nodes() {
    srun --nodes="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 "${container[@]}" "$@"
}

# One task a rank, without torchrun: it needs no rendezvous, so a node that does not answer can be named.
preflight_step() {
    local cpus=$((${SLURM_CPUS_PER_TASK:-64} / processes_per_node))
    MASTER_PORT=$((MASTER_PORT + 1)) srun_on_nodes --ntasks-per-node="$processes_per_node" --overcommit \
        --ntasks=$((SLURM_JOB_NUM_NODES * processes_per_node)) --cpus-per-task=$((cpus > 0 ? cpus : 1)) \
        "$python" -m megalong preflight "$@"
}

# Ranks follow SLURM's node order, which follows the network's topology. A requeued job keeps its number, so its logs
# are appended to. A % in the path would be one of srun's placeholders.
training_step() {
    srun_on_nodes --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-64}" \
        --output="${logs//%/%%}/node-%n.log" --open-mode=append \
        bash "$slurm_folder/node.sh" "$processes_per_node" "$logs" "$python" "$slurm_folder/rank.sh" "$@"
}

# Run a step beside this shell, which a signal could not reach otherwise, until it has ended; leaves `status`.
run_step() {
    local step answer
    "$@" &
    step=$!
    status=0
    while :; do
        interrupted=""
        answer=0
        wait "$step" || answer=$?
        # 127: the answer was had the last time, and a signal came in between.
        if [ "$answer" -ne 127 ]; then status=$answer; fi
        if [ -z "$interrupted" ] || [ "$answer" -eq 127 ]; then break; fi
    done
    if [ -n "${reminder:-}" ]; then kill "$reminder" 2>/dev/null || true; fi
    return "$status"
}

# Told by SLURM: tell the ranks. Again and again, because one that is still starting cannot listen yet.
pass_on() {
    interrupted=1
    say "SIG$1: the ranks save and leave"
    if [ -n "${reminder:-}" ]; then return; fi
    (
        # A job that SLURM is ending already has had its signal from SLURM.
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
    # Cancelled, or requeued by SLURM or by hand: only a job that still runs is ours to put back.
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then
        say "saved; SLURM is ending this job itself"
        return
    fi
    # Less time than one step and a save would otherwise go round for ever.
    if [ -e "$logs/requeued-at" ] && same_step "$marker" "$logs/requeued-at"; then
        say "no step was done since the last requeue, so this job is not requeued: give it more --time, or a shorter" \
            "slurm.lead_minutes"
        exit 1
    fi
    cp -- "$marker" "$logs/requeued-at"
    say "saved; requeued"
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "this cluster requeues no jobs: submit the same again, it goes on from the last save"
        exit 1
    fi
}

same_step() {
    [ "$(grep -o '"step": *[0-9]*' "$1")" = "$(grep -o '"step": *[0-9]*' "$2")" ]
}
