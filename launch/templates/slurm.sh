#!/bin/bash
$directives

# The head of a Ray cluster, its other nodes and the driver are steps of this job. The driver's exit code is the job's.
# SIGUSR1, before the time is over or by `scancel --signal=USR1`: save, and queue the job again.
# SIGTERM to this script (`symile-dist stop`): save and end.
umask 077
$environment
rm -f $folder/exit_code
this=$$SLURM_JOB_ID  # the id of an array's last task is the whole array's
[ -z "$${SLURM_ARRAY_JOB_ID:-}" ] || this=$${SLURM_ARRAY_JOB_ID}_$$SLURM_ARRAY_TASK_ID
meeting=$state/slurm/$$SLURM_JOB_ID-$${SLURM_RESTART_COUNT:-0}
mkdir -p "$$meeting"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$$meeting/token"
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$$meeting/token"

signalled= passed_on= preempted= stopped= driver= nodes=()
pass_on() {  # as SIGUSR1: srun would take SIGTERM for its own. Once: a second one would end the driver in mid-save
    signalled=1
    [ -z "$$driver" ] || [ -n "$$passed_on" ] || { passed_on=1; kill -USR1 "$$driver"; }
}
trap 'preempted=1; pass_on' USR1
trap '[ -n "$$preempted" ] || stopped=1; pass_on' TERM  # after SIGUSR1 it is Slurm's, whose time is over

ended() {
    kill -USR2 "$${nodes[@]}" 2> /dev/null  # to end; srun passes it on
    for _ in {1..40}; do kill -0 "$${nodes[@]}" 2> /dev/null || break; sleep 0.25; done
    rm -rf "$$meeting"
    [ -z "$$passed_on" ] || [ "$$1" != 138 ] || set -- 75  # SIGUSR1 came before the driver was ready for it
    if [ -z "$$stopped" ] && [ -n "$requeue" ] && { [ "$$1" = 75 ] || { [ -n "$$preempted" ] && [ "$$1" != 0 ]; }; }; then
        echo "the job is queued again; it goes on from its newest checkpoint"
        scontrol requeue "$$this" && sleep 60
    fi
    echo "$$1" > $folder/exit_code
    exit "$$1"
}

mapfile -t hosts < <(scontrol show hostnames "$$SLURM_JOB_NODELIST")
neighbour=  # tells the head on which network it is: Slurm's address of another node
[ -z "$${hosts[1]:-}" ] || neighbour=$$(scontrol show node "$${hosts[1]}" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
$steps
(trap '' USR1; exec "$${on_head[@]}" $node head --folder "$$meeting" --toward "$$neighbour" $sizes) &
head=$$! nodes+=($$!)
$workers
until [ -s "$$meeting/address" ]; do
    kill -0 "$$head" 2> /dev/null || { echo "Ray's head has not started"; ended 1; }
    [ -z "$$signalled" ] || ended 75
    sleep 0.5
done
export RAY_ADDRESS=$$(cat "$$meeting/address")
"$${on_head[@]}" $driver_command &
driver=$$!
[ -z "$$signalled" ] || pass_on
while signalled= && wait "$$driver"; code=$$?; [ -n "$$signalled" ]; do :; done
ended "$$code"
