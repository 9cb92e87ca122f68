# shellcheck shell=bash
# What all job scripts here share: find the environment, check the nodes, run the pipeline on every
# task, and decide by its exit code whether the job is requeued. Site settings: docs/slurm.md.
#
#   allmem_run DEFAULT_WORD… -- "$@"      # the words of pipeline.run; of two for one key the later counts

set -uo pipefail

EXIT_SETTINGS=2  # a setting of the site or the call that the user can mend
EXIT_REQUEUE=75  # pipeline.survival: stopped and saved
EXIT_LOST=76     # pipeline.survival: a rank died
EXIT_HANG=77     # pipeline.survival: the ranks waited for each other

stop_asked=0 # the time limit comes near, or somebody wants the job to end
trapped=0    # a trap has run since the last look
step_pid=

allmem_say() { echo "[$(date -u +%FT%TZ) job $(job_ref) on ${SLURMD_NODENAME:-$HOSTNAME}] $*" >&2; }

allmem_fail() {
    allmem_say "error: $1"
    exit "${2:-$EXIT_SETTINGS}"
}

job_ref() {
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "${SLURM_JOB_ID:-none}"
    fi
}

# last_value KEY WORD…: the value of the last KEY=VALUE, without Hydra's quotes
last_value() {
    local key=$1 found='' word
    shift
    for word in "$@"; do
        [[ $word == "$key="* ]] && found=${word#*=}
    done
    case $found in
    \'*\' | \"*\")
        found=${found:1:-1}
        found=${found//\\\'/\'}
        ;;
    esac
    echo "$found"
}

# ALLMEM_ENV: a virtual environment, the prefix of a conda environment, a script to source, or none
allmem_environment() {
    export PYTHONPATH=$ALLMEM_HOME${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
    [[ -n ${ALLMEM_CONTAINER:-} || ${ALLMEM_ENV:-} == none ]] && return
    local given=${ALLMEM_ENV:-$ALLMEM_HOME/.venv}
    set +u # scripts of other people
    if [[ -f $given/bin/activate ]]; then
        # shellcheck disable=SC1091
        source "$given/bin/activate"
    elif [[ -x $given/bin/python ]]; then
        PATH=$given/bin:$PATH
    elif [[ -f $given ]]; then
        # shellcheck disable=SC1090
        source "$given"
    else
        allmem_fail "ALLMEM_ENV=$given is neither a virtual environment nor a script; run make install in $ALLMEM_HOME or set ALLMEM_ENV"
    fi
    set -u
    command -v python >/dev/null || allmem_fail "ALLMEM_ENV=$given brings no python; set ALLMEM_ENV"
}

# Where the ranks meet: rank 0's node, by a name or address that the others can use
allmem_meeting_place() {
    ALLMEM_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
    [[ -n $ALLMEM_NODES ]] || allmem_fail "scontrol show hostnames $SLURM_JOB_NODELIST names no node on ${SLURMD_NODENAME:-$HOSTNAME}; put Slurm's commands on PATH there"
    local first=${ALLMEM_NODES%%,*}
    if ! getent hosts "$first" >/dev/null; then
        first=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
        [[ -n $first ]] || allmem_fail "${ALLMEM_NODES%%,*} has no address, neither by name nor as NodeAddr of scontrol show node; tell your administrators"
    fi
    export ALLMEM_NODES MASTER_ADDR=$first
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))
    unset RANK WORLD_SIZE LOCAL_RANK # of whoever submitted; srun numbers the tasks
}

# srun in the background, so that traps run at once; the exit code that says why the step ended
allmem_step() {
    local code before=127 first
    ((stop_asked)) && return "$EXIT_REQUEUE"
    rm -rf "$codes"
    mkdir -p "$codes"
    srun --kill-on-bad-exit=1 --wait=600 "$@" &
    step_pid=$!
    ((stop_asked)) && kill -USR1 "$step_pid" # it came between the lines above
    while :; do
        trapped=0
        wait "$step_pid"
        code=$?
        ((trapped)) || break
        before=$code # perhaps the trap's, perhaps the step's own
    done
    step_pid=
    if ((code == 127 && before != 127)); then code=$before; fi
    # srun gives the highest code, which is that of tasks it killed: the first one is the reason
    first=$(cd "$codes" && find . -type f ! -name '*.75' -printf '%T@ %f\n' | sort -n | head -n 1)
    if [[ -n $first ]]; then
        code=${first##*.}
    elif [[ -n $(find "$codes" -name '*.75' -print -quit) ]]; then
        code=$EXIT_REQUEUE
    fi
    rm -rf "$codes"
    return "$code"
}

# One task on every node: removes this job's own folder, and what jobs that were killed have left
allmem_clean_nodes() {
    # shellcheck disable=SC2016
    timeout 120 srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 \
        --kill-on-bad-exit=0 bash -c '
        alive=$(squeue -h -u "$USER" -o .%A.) || alive=unknown
        for folder in "$1/allmem.$USER."*."$SLURMD_NODENAME"; do
            [ -O "$folder" ] || continue
            job=${folder#"$1/allmem.$USER."} job=${job%%.*}
            case "$job:$alive" in
            "$SLURM_JOB_ID":*) ;;
            *:unknown | *:*".$job."*) continue ;;
            esac
            rm -rf -- "$folder"
        done' clean "$ALLMEM_SCRATCH" || allmem_say "node-local scratch could not be cleaned"
}

# A module of the project on every task, with scratch of its node, in the container if there is one
allmem_python() {
    local options=() words=()
    if [[ -n ${ALLMEM_CONTAINER:-} ]]; then
        local mounts=$ALLMEM_HOME:$ALLMEM_HOME,$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR,$run_dir:$run_dir
        mounts+=,$ALLMEM_SCRATCH:$ALLMEM_SCRATCH${ALLMEM_MOUNTS:+,$ALLMEM_MOUNTS}
        options+=("--container-image=$ALLMEM_CONTAINER" "--container-mounts=$mounts")
        options+=("--container-workdir=$SLURM_SUBMIT_DIR")
    fi
    read -ra words <<<"${ALLMEM_WRAPPER:-}"
    # shellcheck disable=SC2016
    allmem_step "${options[@]}" bash -c '
        export TMPDIR="$1/allmem.$USER.$SLURM_JOB_ID.$SLURMD_NODENAME"
        mkdir -p -m 700 "$TMPDIR" || exit 2
        export TRITON_CACHE_DIR="$TMPDIR/triton" TORCHINDUCTOR_CACHE_DIR="$TMPDIR/inductor"
        codes=$2
        shift 2
        trap : USR1 TERM # Slurm signals this shell, too; it waits for what it has started
        "$@"
        code=$?
        [ "$code" -eq 0 ] || : >"$codes/$SLURM_PROCID.$code"
        [ "$code" -eq 75 ] && exit 0 # stopped as asked: no reason to kill those that still save
        exit "$code"' task "$ALLMEM_SCRATCH" "$codes" \
        "${words[@]}" python -m "$@"
}

on_stop() {
    trapped=1
    ((stop_asked)) && return # a second signal would end the ranks before they have saved
    stop_asked=1
    allmem_say "$1: asks the ranks to save and stop"
    [[ -n $step_pid ]] && kill -USR1 "$step_pid" # srun passes it on to its tasks
}

# Failures of this job since a stage was last completed or a checkpoint written, this one included
count_failure() {
    local file count=0
    file=$run_dir/.slurm/$(job_ref).failures
    mkdir -p "${file%/*}"
    if [[ -f $file ]]; then
        count=$(<"$file")
        if [[ -n $(find "$run_dir" -mindepth 2 -maxdepth 3 \
            \( -path '*/checkpoints/step_*' -o -name DONE.json \) -newer "$file" -print -quit) ]]; then
            count=0
        fi
    fi
    echo $((count + 1)) >"$file"
    echo $((count + 1))
}

# Give the job back to the queue; it starts again with the same words, folder and MLflow run
allmem_requeue() {
    local code=$1 state
    state=$(scontrol show job -o "$(job_ref)" | sed -n '1s/.* JobState=\([^ ]*\).*/\1/p')
    if [[ $state != RUNNING ]]; then
        allmem_say "Slurm has the job as $state already"
    elif ((${SLURM_RESTART_COUNT:-0} >= ${ALLMEM_MAX_RESTARTS:-100})); then
        allmem_say "error: restarted ${SLURM_RESTART_COUNT} times (ALLMEM_MAX_RESTARTS); the same sbatch goes on"
    else
        allmem_say "requeues itself"
        scontrol requeue "$(job_ref)" || allmem_say "error: not requeued; the same sbatch goes on"
    fi
    exit "$code"
}

allmem_end() {
    local code=$1 failures
    allmem_clean_nodes
    if ((code == 0)); then
        allmem_say "complete"
        exit 0
    fi
    if ((stop_asked && (code == EXIT_REQUEUE || code > 128))); then
        ((code == EXIT_REQUEUE)) || allmem_say "ended by $code before it could save"
        allmem_requeue "$EXIT_REQUEUE"
    fi
    case $code in
    "$EXIT_REQUEUE") allmem_requeue "$code" ;;
    "$EXIT_LOST" | "$EXIT_HANG" | 129 | 1[3-8]?) # 128 + signal; 255 is srun's own error
        failures=$(count_failure)
        if ((failures <= ${ALLMEM_MAX_FAILURES:-3})); then
            allmem_say "a task was lost or hung (exit code $code), $failures in a row without a checkpoint between"
            allmem_requeue "$code"
        fi
        allmem_fail "a task was lost or hung (exit code $code), $failures times without a checkpoint between (ALLMEM_MAX_FAILURES); look why, then the same sbatch goes on" "$code"
        ;;
    *) allmem_fail "ended with exit code $code; docs/survival.md says what it means" "$code" ;;
    esac
}

allmem_run() {
    local words=() code codes
    trap 'on_stop "the time limit is near (SIGUSR1)"' USR1
    trap 'on_stop "Slurm ends the job (SIGTERM)"' TERM
    [[ -n ${SLURM_JOB_ID:-} ]] || allmem_fail "this is a job script: sbatch $0 [overrides…]"
    while [[ $# -gt 0 && $1 != -- ]]; do
        words+=("$1")
        shift
    done
    shift
    words+=("$@")
    local recipe
    recipe=$(last_value recipe "${words[@]}")
    run_dir=$(last_value run.dir "${words[@]}")
    if [[ -z $run_dir ]]; then
        run_dir=${ALLMEM_RUNS:-$SLURM_SUBMIT_DIR/runs}/$recipe
        words+=("run.dir='${run_dir//\'/\\\'}'")
    fi
    ALLMEM_HOME=$(cd "$ALLMEM_HOME" && pwd) # before the next line, which changes the folder
    cd "$SLURM_SUBMIT_DIR" || allmem_fail "the folder of submission, $SLURM_SUBMIT_DIR, is not on ${SLURMD_NODENAME:-$HOSTNAME}"
    mkdir -p "$run_dir" || allmem_fail "run.dir=$run_dir cannot be made on ${SLURMD_NODENAME:-$HOSTNAME}; set ALLMEM_RUNS"
    run_dir=$(cd "$run_dir" && pwd)
    codes=$run_dir/.slurm/$(job_ref).codes
    : "${USER:=$(id -un)}"
    export USER
    ALLMEM_SCRATCH=${ALLMEM_SCRATCH:-${SLURM_TMPDIR:-/tmp}}
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
        export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from sbatch by itself
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
    fi
    allmem_environment
    allmem_meeting_place
    allmem_say "restart ${SLURM_RESTART_COUNT:-0}, nodes $ALLMEM_NODES: ${words[*]}"
    allmem_clean_nodes

    if [[ ${ALLMEM_PREFLIGHT:-1} != 0 ]]; then
        allmem_python pipeline.preflight "${words[@]}"
        code=$?
        ((stop_asked)) && allmem_end "$EXIT_REQUEUE"
        if ((code)); then
            allmem_clean_nodes
            allmem_fail "preflight ended with exit code $code (ALLMEM_PREFLIGHT=0 leaves it out)" "$code"
        fi
    fi
    allmem_python pipeline.run "${words[@]}"
    allmem_end $?
}
