#!/bin/bash
# Many restarts of one search as a SLURM job array that survives its walltime; one report at the end.
#
#     bash slurm_array.sh search.toml runs 40      on the login node: submits restarts 0 to 39 into the folder `runs`,
#                                                  and a job that writes runs/report.html when all of them have ended
#
# Each task runs one restart and stores every energy evaluation as it is made. Some time before the walltime SLURM sends
# SIGTERM to this script; thalweg then ends the evaluation it is in, and the task is put back into the queue, where it
# goes on from its last evaluation. So a short --time costs nothing, and gets through the queue sooner.
#
# To be changed: the lines below, and the lines under "environment". cluster.md says more. Options for sbatch in
# THALWEG_SBATCH (such as THALWEG_SBATCH="--partition=short --account=chem") come on top.

#SBATCH --job-name=thalweg
#SBATCH --time=01:00:00
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=2G
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#SBATCH --output=thalweg-%A_%a.log

set -u
GRACE=${THALWEG_GRACE:-90}        # seconds that thalweg may take to end; less than the 120 of --signal above
MOST_REQUEUES=${THALWEG_MOST_REQUEUES:-100} # 0: this cluster does not let tasks requeue themselves
ROUNDS=${THALWEG_ROUNDS:-1}       # submit the array so many times, one after the other: instead of requeueing
MORE_TO_DO=75                     # exit code by which thalweg says that it was stopped before the end

# ---- on the login node: submit
if [ -z "${SLURM_JOB_ID:-}" ]; then
    if [ $# -ne 3 ]; then
        echo "usage: bash $0 FILE.toml FOLDER RESTARTS" >&2
        exit 2
    fi
    after="" jobs=""
    # shellcheck disable=SC2086  # several options in one variable
    for ((round = 0; round < ROUNDS; round++)); do
        job=$(sbatch --parsable ${THALWEG_SBATCH:-} $after --array="0-$(($3 - 1))" "$0" "$1" "$2" "$3") || exit 1
        job=${job%%;*} # a cluster's name may follow
        after=--dependency=afterany:$job jobs="$jobs $job"
    done
    # shellcheck disable=SC2086
    report=$(sbatch --parsable ${THALWEG_SBATCH:-} $after --output=thalweg-%j-report.log "$0" "$1" "$2" "$3") || exit 1
    echo "restarts 0 to $(($3 - 1)): job$jobs, then the report: job ${report%%;*}"
    exit
fi

# ---- environment: what the job needs to find thalweg and the calculator
# module load vasp
# source "$HOME/venvs/thalweg/bin/activate"
export THALWEG_NUM_THREADS=${THALWEG_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} # where SLURM does not bind tasks to cores

# ---- the last job: the report
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    exec thalweg report "$2"
fi

# ---- one restart
seconds=()
if [ -n "${SLURM_JOB_END_TIME:-}" ]; then # newer versions of SLURM say when it ends: a second line of defence
    left=$((SLURM_JOB_END_TIME - $(date +%s) - GRACE))
    seconds=(--max-seconds "$((left > 0 ? left : 0))")
fi
# bash runs a trap only when no command is in the foreground, so thalweg runs in the background and is waited for
told=0 search=
trap 'told=1; kill -TERM $search 2>/dev/null' TERM
thalweg run "$1" --out "$2" --restarts "$3" --restart-index "$SLURM_ARRAY_TASK_ID" --workers 1 \
    --stopped-exit-code "$MORE_TO_DO" ${seconds[@]+"${seconds[@]}"} &
search=$!
[ "$told" = 0 ] || kill -TERM "$search"
wait "$search"
code=$?
if [ "$told" = 1 ]; then # `wait` was interrupted: wait again, but not past the walltime
    for ((second = 0; second < GRACE; second++)); do
        kill -0 "$search" 2>/dev/null || break
        sleep 1
    done
    if kill -0 "$search" 2>/dev/null; then
        code=$MORE_TO_DO # a long evaluation: it is lost, what was stored before it is not
    else
        wait "$search"
        code=$?
        [ "$code" != 143 ] || code=$MORE_TO_DO # the signal came while thalweg was starting
    fi
fi

if [ "$code" = "$MORE_TO_DO" ]; then
    [ "$MOST_REQUEUES" != 0 ] || exit "$code"
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MOST_REQUEUES" ]; then
        echo "requeued $MOST_REQUEUES times already; giving up" >&2
        exit 1
    fi
    trap '' TERM # requeueing sends another one
    # a task that somebody cancelled is told by the same signal, and must not come back
    state=$(squeue --noheader --format=%T --job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID")
    [ "$state" = RUNNING ] || exit "$code"
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" && exit
    echo "this task could not be put back into the queue; submit again to go on, or see THALWEG_ROUNDS" >&2
fi
exit "$code"
