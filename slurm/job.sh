# What every job of a run does around its work. Sourced by the sbatch files, which set
#   here    RUN/slurm: the frozen config, code and cluster.env, the journal and the logs
#   stage   the name of the job and of its sbatch file
# shellcheck shell=bash disable=SC2154
run=${here%/slurm}
. "$here/cluster.env"
# The frozen code, and not what lies in the working folder.
export PYTHON PYTHONPATH="$here/code" PYTHONSAFEPATH=1
# What no sbatch sets is of the shell in which somebody submitted this file by hand, itself inside a job.
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" "${!SLURM_STEP_@}"
export SLURM_EXPORT_ENV=ALL # some sites' sbatch says NONE, which would keep all of this from the ranks
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it from the sbatch file's head
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
copies=${LOCAL_SCRATCH:+$LOCAL_SCRATCH/latemask-${USER:-$(id -un)}} # two users share a disk, never a folder
setup
set -uo pipefail # not before: the commands of modules use variables that are not set
trap 'note exit "\"code\": $?"' EXIT
echo "== $stage, job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST, $(date -Is)"

note() { # note EVENT DETAILS [JOB]: a line of the journal
    printf '{"event": "%s", "stage": "%s", "job": "%s", "time": %s, %s}\n' \
        "$1" "$stage" "${3:-$SLURM_JOB_ID}" "$(date +%s)" "$2" >>"$here/journal.jsonl"
}

step() { # step COMMAND...: in every task of the job
    srun --kill-on-bad-exit=1 "${SRUN[@]}" "${WRAP[@]}" "$@"
}

helper() { # helper MODULE WORD...: in one task
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${SRUN[@]}" "${WRAP[@]}" "$PYTHON" -m "$@"
}

unjobbed() { # unjobbed COMMAND...: without this job's variables, which the next job's srun would obey; in a subshell
    local name
    for name in "${!SLURM_@}"; do
        case ${name#SLURM_} in
        CONF | JWT | CLUSTERS | DEBUG | DEBUG_FLAGS | TIME_FORMAT | EXIT_ERROR | UMASK) ;;
        *) unset "$name" ;;
        esac
    done
    "$@"
}

sent_back() { # sent_back JOB: it is known, and does not run any more
    scontrol -o show job "$1" | grep -qv JobState=RUNNING
}

again() { # again [NODES]: the same job once more, from now on without NODES
    # The last task of an array has the array's own id, which would send back every task. Where a job of
    # another kind has a SLURM_ARRAY_TASK_ID, it is that of the task in which somebody submitted it.
    local me=$SLURM_JOB_ID only=() without new
    [ "$stage" != array ] || me=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID only=(--array="$SLURM_ARRAY_TASK_ID")
    without=$(scontrol -o show job "$me" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    without=${without#(null)}${without:+${1:+,}}${1:-}
    without=${without#,}
    trap '' TERM # a requeue ends this script, but gives it the time for what follows
    # It fails where a preemption, a lost node or a person has sent the job back a moment before.
    if [ "${REQUEUE:-yes}" = yes ] && { scontrol requeue "$me" || sent_back "$me"; }; then
        [ -z "$without" ] || scontrol update JobId="$me" ExcNodeList="$without"
        # Slurm may kill the sleep a moment before this script, which must not go on to submit a second job.
        while :; do sleep 60; done
    fi
    new=$(unjobbed sbatch --parsable ${without:+--exclude="$without"} "${only[@]}" "$here/$stage.sbatch") || exit 1
    # Who waits for this job waits for the new one.
    squeue --me --noheader --states=PENDING --format='%i %E' |
        sed -n "s/([a-z]*)//g; s/\b$SLURM_JOB_ID\b/$new/p" | while read -r id after; do
        scontrol update JobId="$id" Dependency="$after"
    done
    note submit "\"instead_of\": \"$me\"" "$new"
    exit 0
}

obey() { # obey VERDICT CODE: `done`, `again [NODES]`, or anything else to stop
    case $1 in
    done) exit 0 ;;
    again) again ;;
    "again "*) again "${1#again }" ;;
    *) exit $(($2 ? $2 : 1)) ;;
    esac
}

begin() { # gives up after MAX_ATTEMPTS attempts without progress
    helper slurm.attempts begin "$run" "$stage" --job "$SLURM_JOB_ID" --nodes "$SLURM_JOB_NODELIST" \
        --limit "${MAX_ATTEMPTS:-3}" || exit
}

finish() { # finish CODE: what the run says of this attempt decides what follows
    obey "$(helper slurm.attempts end "$run" "$stage" --job "$SLURM_JOB_ID" --code "$1" \
        --limit "${MAX_ATTEMPTS:-3}")" "$1"
}

preflight() { # every rank looks round; a bad node is named, and the job goes on elsewhere
    local report code
    [ "${PREFLIGHT:-yes}" = yes ] || return
    report="$here/preflight/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    # A node may be so ill that its ranks never end.
    srun --wait=60 "${SRUN[@]}" "${WRAP[@]}" "$PYTHON" -m slurm.preflight "$here/config.yaml" \
        --report "$report" --copies "$copies" --gpus "${GPUS_PER_NODE:-0}" && return
    code=$?
    obey "$(helper slurm.preflight "$here/config.yaml" --report "$report" --run "$run" --job "$SLURM_JOB_ID" \
        --judge "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)" \
        --limit "${MAX_ATTEMPTS:-3}")" "$code"
}

stage_corpus() { # a checked copy of the corpus on each node's own disk; where that fails the original is read
    [ -z "$copies" ] && return
    srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "${SRUN[@]}" "${WRAP[@]}" \
        "$PYTHON" -m slurm.stage "$here/config.yaml" --to "$copies"
}
