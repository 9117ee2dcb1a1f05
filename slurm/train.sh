#!/bin/bash
# Trains on any number of nodes and GPUs. From the project's root:
#
#   sbatch --nodes 2 --gpus-per-node 4 slurm/train.sh --recipe fast --shards shards/official
#   sbatch --nodes 2 slurm/train.sh --recipe fast     all GPUs of each node; without GPUs one process on its CPUs
#
# What follows the script's name goes to mnistm_dist.train. The run folder is runs/slurm-JOBID unless --run-dir names
# another. Ahead of the time limit the run saves and leaves, and the job is requeued and goes on in that folder; so it
# does after a preemption and after a node has failed. `scancel JOBID` saves and ends it for good;
# `scancel --batch --signal=USR1 JOBID` saves and requeues it now.
#
# Edit for your cluster: account, partition, time, and the lines that make Python available. Where nodes are shared,
# replace --exclusive and --mem by what a job needs of each (--cpus-per-gpu=8 --mem-per-gpu=16G, say).
##SBATCH --account=NAME
##SBATCH --partition=NAME
#SBATCH --time=04:00:00
#SBATCH --job-name=mnistm_dist
#SBATCH --output=mnistm_dist-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:USR1@180
#SBATCH --requeue

set -euo pipefail

# module load python/3.11
# source .venv/bin/activate
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
PYTHON=${PYTHON:-python}

stop() {
  echo "error: $1" >&2
  exit 2
}
[ -n "${SLURM_JOB_ID:-}" ] || stop "no Slurm job: start this by sbatch; without Slurm use accelerate launch (README.md)"
"$PYTHON" -c 'import mnistm_dist' || stop "$PYTHON cannot import mnistm_dist: edit the lines above, or set PYTHON"

# One task per GPU: Slurm then signals the trainers themselves and sees their exit codes. `accelerate launch` on each
# node works too, but turns every exit code into 1, and kills the trainers 30 seconds after it was signalled.
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}} gpu_options=()
gpus=${gpus##*:}
# Asked for again, since a step gets no GPU unasked that came with a whole node. NCCL wants each task to see all of its
# node's, so none is bound to one (--gpu-bind=none would hide them all in Slurm 22.05), and what sbatch was asked per
# task or per GPU is dropped.
[ "$gpus" = 0 ] || gpu_options=(--gpus-per-node="$gpus")
unset SLURM_GPUS SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK
tasks_per_node=${SLURM_NTASKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
tasks=$((SLURM_JOB_NUM_NODES * tasks_per_node))
[ "${SLURM_NTASKS:-$tasks}" = "$tasks" ] ||
  stop "--ntasks: $SLURM_NTASKS, this job starts $tasks; use --ntasks-per-node"
# The fewest CPUs of any node: SLURM_JOB_CPUS_PER_NODE is such as 64(x3),32.
cpus=$(tr , '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | sed -n 1p)
cpus_per_task=$((cpus > tasks_per_node ? cpus / tasks_per_node : 1))

# The head is this node, the first of the job. The port is the job's own, or the next one that nobody listens on.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
[ -n "$MASTER_ADDR" ] || stop "Slurm names no node for job $SLURM_JOB_ID"
# A node's name in Slurm need not be one that the network knows; its address in Slurm is.
getent hosts "$MASTER_ADDR" >/dev/null ||
  MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
while (: <>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$tasks LOCAL_WORLD_SIZE=$tasks_per_node

# Later flags beat earlier ones, so these give way to the arguments; but a requeued job goes on where it was, not at the
# checkpoint at which it began.
resume=auto previous=
for argument; do
  case $argument in --resume=*) resume=${argument#*=} ;; esac
  case $previous in --resume) resume=$argument ;; esac
  previous=$argument
done
defaults=(--expect-world-size "$tasks" --resume auto)
[ "$resume" != auto ] || defaults+=(--run-dir "runs/slurm-$SLURM_JOB_ID")
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || set -- "$@" --resume "${resume%/checkpoints/step-*}"

on_cpu=''
[ "$gpus" -gt 0 ] || on_cpu=" (so on CPU)"
echo "job $SLURM_JOB_ID, launch $((${SLURM_RESTART_COUNT:-0} + 1)): nodes $SLURM_JOB_NODELIST, processes per node" \
  "$tasks_per_node, CPUs per process $cpus_per_task, GPUs per node $gpus$on_cpu, head $MASTER_ADDR:$MASTER_PORT"

# USR1 reaches this shell alone, and srun forwards it (a TERM would make srun kill). TERM (preemption, scancel) Slurm
# sends to the trainers too. Both are repeated, since a trainer that is still starting hears neither.
srun_pid='' signalled=no
# shellcheck disable=SC2317  # the traps call it
ask_again() {
  signalled=yes
  (while sleep 2 && kill -USR1 "$srun_pid"; do :; done) 2>/dev/null &
}
trap '[ -z "$srun_pid" ] || kill -USR1 "$srun_pid"; ask_again' USR1
trap ask_again TERM

# --wait and not --kill-on-bad-exit: whoever ends first, the others have 30 seconds to save, to say what went wrong, and
# to leave. The rank's variables are expanded inside the task.
# shellcheck disable=SC2016
srun --export=ALL --ntasks="$tasks" --ntasks-per-node="$tasks_per_node" --cpus-per-task="$cpus_per_task" \
  "${gpu_options[@]}" --kill-on-bad-exit=0 --wait=30 \
  bash -c 'trap "" USR1 TERM; export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"' task \
  "$PYTHON" -m mnistm_dist.train "${defaults[@]}" "$@" &
srun_pid=$!
[ "$signalled" = no ] || ask_again

code=0
wait "$srun_pid" || code=$?
while [ "$signalled" = yes ]; do
  # It was the signal that ended the wait.
  signalled=no code=0
  wait "$srun_pid" || code=$?
done

# 75: saved and left. The time limit or a preemption asked for it where the job still counts as running; scancel where
# it does not.
if [ "$code" = 75 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
  echo "job $SLURM_JOB_ID: saved, to be requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
