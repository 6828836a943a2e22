# Sourced by the sbatch files of this folder: interpreter, rendezvous, and what happens after a signal.
#
# Slurm's variables that are read: SLURM_JOB_ID, SLURM_JOB_NUM_NODES, SLURM_JOB_NODELIST, SLURM_GPUS_ON_NODE,
# SLURM_RESTART_COUNT; inside srun SLURM_NODEID. All nodes must see the same repository, models and results (a shared file
# system).

# Requeued so many times at most, so that a job that is stopped over and over ends.
MOST_RESTARTS="${MOST_RESTARTS:-20}"
# torch's launcher: seconds from a signal to SIGKILL, in which a step and a checkpoint must fit, and the signals that it
# passes on.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1

fail() {
    echo "error: $*" >&2
    exit 2
}

activate() { # The environment of PYTHON=, else .venv, which quickstart.sh creates.
    python="${PYTHON:-.venv/bin/python}"
    [ -x "$python" ] || command -v "$python" >/dev/null || fail "$python: no such interpreter; bash quickstart.sh creates .venv, PYTHON= names another"
}

# Where the processes meet: the first node, and a port that two jobs on a node do not share.
choose_rendezvous() {
    nodes="${SLURM_JOB_NUM_NODES:-1}"
    gpus="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
    host="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    port=$((20000 + SLURM_JOB_ID % 20000))
}

# Run a command in the background and pass on the signals that Slurm sends to this script (SIGUSR1 before the time limit,
# SIGTERM at preemption). Sets `code` and `stopped`, the signal's name.
run_with_signals() {
    stopped=""
    "$@" &
    child=$!
    trap 'stopped=USR1; kill -USR1 "$child" 2>/dev/null' USR1
    trap 'stopped=TERM; kill -TERM "$child" 2>/dev/null' TERM
    while :; do
        code=0
        wait "$child" || code=$?
        # `wait` also returns when a trap has run; the command may still be writing its checkpoint.
        kill -0 "$child" 2>/dev/null || break
    done
    trap - USR1 TERM
}

# After a signal put the job back into the queue, where the same command continues from its checkpoint; other errors end
# the job with their code.
finish() {
    if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then
        if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MOST_RESTARTS" ]; then
            echo "stopped by SIG$stopped: job $SLURM_JOB_ID goes back into the queue"
            scontrol requeue "$SLURM_JOB_ID"
            exit 0
        fi
        echo "stopped by SIG$stopped after $SLURM_RESTART_COUNT restarts: not requeued (MOST_RESTARTS=$MOST_RESTARTS)" >&2
    fi
    exit "$code"
}
