#!/bin/bash
# Train on any number of nodes and GPUs. From the root of the project:
#
#   sbatch --nodes 2 --gpus-per-node 4 slurm/train.sh --recipe fast --shards shards/official
#   sbatch --nodes 2 slurm/train.sh --recipe fast     all GPUs of each node, or one process on its CPUs
#
# Arguments after the name of the script are passed to mnistm_dist.train. The run folder is runs/slurm-JOBID unless
# --run-dir is given. Before the time limit, the run saves a checkpoint and exits; the job is requeued and resumes in
# the same folder. A requeued job also resumes there after a preemption or a node failure. `scancel JOBID` saves and
# ends the job; `scancel --batch --signal=USR1 JOBID` saves and requeues it now.
#
# Edit for your cluster: account, partition, time, and the lines that make Python available. If nodes are shared between
# jobs, replace --exclusive and --mem by what a job needs (for example --cpus-per-gpu=8 --mem-per-gpu=16G).
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
[ -n "${SLURM_JOB_ID:-}" ] || stop "not in a Slurm job: use sbatch, or accelerate launch without Slurm (README.md)"
"$PYTHON" -c 'import mnistm_dist' || stop "$PYTHON cannot import mnistm_dist: edit the lines above, or set PYTHON"

# One task per GPU: Slurm then signals the training processes directly and gets their exit codes. `accelerate launch` on
# each node works too, but replaces every exit code by 1, and kills the processes 30 seconds after a signal.
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}} gpu_options=()
gpus=${gpus##*:}
# Request the GPUs again for the step: if they came with a whole node, a step gets none by default. NCCL needs each
# task to see all GPUs of its node, so tasks are not bound to GPUs (--gpu-bind=none hides all of them in Slurm 22.05),
# and the options of sbatch per task and per GPU are dropped.
[ "$gpus" = 0 ] || gpu_options=(--gpus-per-node="$gpus")
unset SLURM_GPUS SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK
tasks_per_node=${SLURM_NTASKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
tasks=$((SLURM_JOB_NUM_NODES * tasks_per_node))
[ "${SLURM_NTASKS:-$tasks}" = "$tasks" ] ||
  stop "--ntasks: $SLURM_NTASKS, this job starts $tasks tasks; use --ntasks-per-node instead"
# The smallest number of CPUs of any node. SLURM_JOB_CPUS_PER_NODE has the form 64(x3),32.
cpus=$(tr , '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | sed -n 1p)
cpus_per_task=$((cpus > tasks_per_node ? cpus / tasks_per_node : 1))

# The head node is this one, the first of the job. The port is derived from the job id; if it is in use, take the next.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
[ -n "$MASTER_ADDR" ] || stop "scontrol lists no node of job $SLURM_JOB_ID ($SLURM_JOB_NODELIST)"
# The name of a node in Slurm may not resolve on the network; its NodeAddr does.
getent hosts "$MASTER_ADDR" >/dev/null ||
  MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
while (: <>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$tasks LOCAL_WORLD_SIZE=$tasks_per_node

# Later flags override earlier ones, so the arguments override these defaults. However, a requeued job resumes from its
# latest checkpoint, not from the checkpoint with which it was first started.
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
[ "$gpus" -gt 0 ] || on_cpu=" (training on CPU)"
echo "job $SLURM_JOB_ID, launch $((${SLURM_RESTART_COUNT:-0} + 1)): nodes $SLURM_JOB_NODELIST, processes per node" \
  "$tasks_per_node, CPUs per process $cpus_per_task, GPUs per node $gpus$on_cpu, head $MASTER_ADDR:$MASTER_PORT"

# Slurm sends USR1 to this shell only; srun forwards it to the tasks (a TERM would make srun kill them). Slurm sends TERM
# (preemption, scancel) to the tasks too. Both are followed by repeated USR1, because a process that is still starting
# ignores signals.
srun_pid='' signalled=no
# shellcheck disable=SC2317  # called by the traps
ask_again() {
  signalled=yes
  (while sleep 2 && kill -USR1 "$srun_pid"; do :; done) 2>/dev/null &
}
trap '[ -z "$srun_pid" ] || kill -USR1 "$srun_pid"; ask_again' USR1
trap ask_again TERM

# --wait instead of --kill-on-bad-exit: when one task has ended, the others have 30 seconds to save, print their error
# and exit. The variables of the rank are expanded inside the task.
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
  # The signal ended the wait, not srun.
  signalled=no code=0
  wait "$srun_pid" || code=$?
done

# 75: the run saved and exited. If the job is still RUNNING, the cause was the time limit or a preemption, otherwise
# scancel.
if [ "$code" = 75 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
  echo "job $SLURM_JOB_ID: saved, to be requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
