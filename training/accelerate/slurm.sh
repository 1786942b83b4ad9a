#!/bin/bash
# A run on SLURM that resumes after a preemption or its time limit, on as many nodes as you ask for:
#
#   sbatch slurm.sh clove_r50_in1k_200ep data.path=/path/to/imagenet/train run.output=/shared/runs/clove
#   sbatch --nodes=1 --gpus-per-node=4 slurm.sh ...          # what is below can be changed on the command line
#
# run.output must be on a file system that all nodes see. Before the time limit, SLURM signals this script, which makes the
# run save and then queues it again; a preempted job gets SIGTERM, saves within the cluster's grace time, and is queued again
# by SLURM. Started again, the run resumes from the step it saved. A run that fails is not queued again.
#SBATCH --job-name=clove-hub
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=80
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

set -u

stopping=""
# scancel signals only the job's steps, which are srun's tasks below, not this shell.
trap 'stopping=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

export HEAD_NODE
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# SIGUSR1 reaches every process of a step. It would end the launcher, and with it the run before it has saved; a signal
# that is ignored here stays ignored in the launcher, while the training processes set up their own handling of it.
srun --kill-on-bad-exit=0 bash -c '
    trap "" USR1
    exec torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --rdzv_id="$SLURM_JOB_ID" \
        --rdzv_backend=c10d --rdzv_endpoint="$HEAD_NODE:$PORT" -m clove_hub.training "$@"
' slurm.sh "$@" &
step=$!

# A signal interrupts `wait`, so it is repeated until srun has ended.
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    status=$?
done

# Launchers report the run's own exit code, 75 for "saved, start again", as 1: only `stopping` distinguishes it from a failure.
if [ -n "$stopping" ] && [ "$status" -ne 0 ]; then
    echo "saved before the time limit; queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
