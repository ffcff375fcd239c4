#!/usr/bin/env bash
# Train on a Slurm cluster, over as many jobs as it takes. Copy this file, edit its #SBATCH lines, and where the
# repository is, with its environment activated:
#
#     sbatch launch/slurm.sh config/train_gpt2.py --out_dir=out/gpt2
#
# Before the time limit all processes save and leave, and the job is queued again; it goes on from there. A job that
# is preempted saves too, and Slurm itself queues it again. One that has finished or failed is not.

#SBATCH --job-name=kqv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

MAX_REQUEUES=${MAX_REQUEUES:-100} # so that a job without progress ends

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export HEAD=${nodes[0]} NODES=${#nodes[@]} ID=$SLURM_JOB_ID
export PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))} # jobs may share a machine

requeue=''
trap 'requeue=yes; kill -USR1 "$training" 2>/dev/null' USR1 # the time limit is near
trap 'requeue=""; kill -USR1 "$training" 2>/dev/null' TERM  # preempted or cancelled
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" launch/multinode.sh "$@" &
training=$!
while kill -0 "$training" 2>/dev/null; do
    wait "$training" # a signal ends the waiting, not the training
done
wait "$training"
status=$?

if [[ $requeue && $status == 0 ]]; then
    if ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
        echo "error: job $SLURM_JOB_ID has been queued $MAX_REQUEUES times: sbatch it again, with a larger" \
            "MAX_REQUEUES, if its steps say that it gets on" >&2
        exit 1
    fi
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
