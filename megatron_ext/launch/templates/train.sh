#!/bin/bash
@DIRECTIVES@

# What is trained stands in RUN_DIRECTORY/slurm/config.json, which `megatron-ext submit` writes; nothing of it is here.
# Every word below is quoted: what a path or an option holds is never taken for a command.

cd @WORK_DIR@ || exit 1
run_dirs=(
@RUN_DIRS@
)
worker=(@PYTHON@ -m megatron_ext.worker)
srun_options=(@SRUN_OPTIONS@)
container=(@CONTAINER@)
attempts=@ATTEMPTS@ # of a run that fails, each from its newest checkpoint
requeue=@REQUEUE@  # whether a run that a signal stopped asks for another turn (in a chain the next job is that)
array=@ARRAY@    # whether this is a task of an array; the variables may come from a job in which this one was submitted
[ "$array" = 1 ] || unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID

# ---- where this job's traces go
run_dir=${run_dirs[${SLURM_ARRAY_TASK_ID:-0}]}
# Never by SLURM_JOB_ID: the one of an array's last task is also that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
logs=$run_dir/slurm/$job
mkdir -p "$logs" || exit 1

note() { # note EVENT [STATUS]: one line for `megatron-ext status`
    printf '{"event": "%s", "job": "%s", "status": %s, "restart": %s, "nodes": "%s", "time": "%s"}\n' \
        "$1" "$job" "${2:-null}" "${SLURM_RESTART_COUNT:-0}" "$SLURM_JOB_NODELIST" "$(date -u +%FT%TZ)" \
        >>"$run_dir/slurm/jobs.jsonl"
}

# ---- the rendezvous of the ranks, and their environment
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MEGATRON_EXT_REQUEUE=1 # the worker exits with 75 when a signal stopped it before its end
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# What each rank runs. USR1 before Python has its handler would end it: it is ignored until then. TERM reaches Python
# beside this shell, which stays to say how Python ended. Ranks that leave with 75 end with 0 here, since srun kills the
# others, who may still be saving, when one ends with anything else.
# shellcheck disable=SC2016 # expanded by the shell of the rank
rank='
    name=$SLURMD_NODENAME-rank$SLURM_PROCID
    exec >>"$0/$name.log" 2>&1
    trap "" USR1
    trap : TERM
    "$@"
    status=$?
    [ "$status" = 0 ] || echo "$status $name" >>"$0/ended"
    [ "$status" != 75 ] || exit 0
    exit "$status"
'

signal=
trap 'signal=USR1' USR1 # from --signal: the time limit is near
trap 'signal=TERM' TERM # SLURM ends the job, and the ranks have got it too

run_once() { # sets status and first: how the run ended, and which rank was the first to fail
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID + 4099 * attempt + 977 * ${SLURM_RESTART_COUNT:-0}) % 12000))
    rm -f "$logs/ended"
    : >"$logs/began"
    srun --kill-on-bad-exit=1 --wait=60 --export=ALL --label "${srun_options[@]}" "${container[@]}" \
        bash -c "$rank" "$logs" "${worker[@]}" "$run_dir/slurm/config.json" &
    local step=$! again=$((SECONDS + 3)) # srun needs a moment until it passes signals on
    while kill -0 "$step" 2>/dev/null; do
        # Passed on again and again: a rank that was still starting has ignored it.
        if [ "$signal" = USR1 ] && ((SECONDS >= again)); then
            kill -USR1 "$step" 2>/dev/null
            again=$((SECONDS + 10))
        fi
        sleep 0.5
    done
    wait "$step"
    status=$?
    first=
    if [ -s "$logs/ended" ]; then
        # The rank that ended first knows the cause; the others were killed for it.
        read -r status first <"$logs/ended"
    fi
}

newest() { cat "$run_dir/checkpoints/latest" 2>/dev/null; }
before=$(newest)

note started
for ((attempt = 1; ; attempt++)); do
    echo "$(date +%T) job $job on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}, attempt $attempt: $run_dir"
    run_once
    echo "$(date +%T) ended with status $status${first:+, first $first; see $logs/$first.log}"
    # Done, or stopped: 143 is TERM before Python had its handler. 2 is an input that another attempt would find as wrong.
    case $status in 0 | 75 | 143) break ;; esac
    [ -z "$first" ] || tail -n 20 "$logs/$first.log"
    if [ "$status" = 2 ] || [ -n "$signal" ] || ((attempt >= attempts)); then break; fi
    note failed "$status"
done

node_lost() { # whether ranks of a node fell silent and SLURM, which asks nodes less often, hears nothing from it either
    local until=$((SECONDS + 150))
    [ "$run_dir/failure.json" -nt "$logs/began" ] || return 1
    grep -q 'no sign of life' "$run_dir/failure.json" || return 1
    while ((SECONDS < until)); do
        if sinfo --noheader --nodes="$SLURM_JOB_NODELIST" --format=%T | grep -q '[*]\|down'; then return 0; fi
        sleep 2
    done
    return 1
}

another_turn() { # whether the run was stopped, or lost a node, and would not end so again and again before its first step
    [ "$requeue" = 1 ] || return 1
    case $status in 75 | 143) ;; 0 | 2) return 1 ;; *) node_lost || return 1 ;; esac
    # A job that SLURM is ending already (scancel, its own requeue, the time limit) is no more RUNNING.
    [ "$(squeue --noheader --jobs="$job" --format=%T 2>/dev/null)" = RUNNING ] || return 1
    [ "$(newest)" != "$before" ] || ((${SLURM_RESTART_COUNT:-0} < 3))
}

if another_turn; then
    note requeued "$status"
    if scontrol requeue "$job"; then exit "$status"; fi
    echo "$(date +%T) SLURM did not requeue the job: submit the run again to go on"
fi
note ended "$status"
exit "$status"
