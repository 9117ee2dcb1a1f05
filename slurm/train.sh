#!/bin/bash
# Trains on any number of nodes and GPUs. From the project's root:
#
#   sbatch --nodes 2 --gpus-per-node 4 slurm/train.sh --recipe fast --shards shards/official
#   sbatch --nodes 2 slurm/train.sh --recipe fast          nodes without GPUs: it runs on their CPUs and says so
#
# Arguments go to mnistm_dist.train. The run folder is runs/slurm-JOBID unless --run-dir says otherwise; the job goes on in it
# after a requeue. Before the time limit the run saves, leaves and is requeued; so it is when a node fails.
#
# Edit for your cluster: account, partition, time, and the line that makes Python available.
##SBATCH --account=NAME
##SBATCH --partition=NAME
#SBATCH --job-name=mnistm_dist
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mnistm_dist-%j.log

set -euo pipefail

# module load python/3.11
# source .venv/bin/activate
PYTHON=${PYTHON:-python}

# One task per GPU, with the rank's variables from Slurm: Slurm then signals the trainers themselves and sees their exit codes. A
# launcher in between would turn every exit code into 1 and kill the trainers 30 seconds after a signal.
tasks_per_node=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
tasks=$((SLURM_JOB_NUM_NODES * tasks_per_node))
cpus_per_task=$((SLURM_CPUS_ON_NODE / tasks_per_node))
[ "$cpus_per_task" -ge 1 ] || cpus_per_task=1

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
[ -n "$MASTER_ADDR" ] || { echo "error: Slurm names no head node for job $SLURM_JOB_ID" >&2; exit 2; }
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE=$tasks_per_node WORLD_SIZE=$tasks

# What a requeue needs, unless the arguments say otherwise.
arguments=("$@")
case " $* " in *" --run-dir"[\ =]*) ;; *) arguments+=(--run-dir "runs/slurm-$SLURM_JOB_ID") ;; esac
case " $* " in *" --resume"[\ =]*) ;; *) arguments+=(--resume auto) ;; esac

echo "job $SLURM_JOB_ID, launch $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST)," \
  "$tasks_per_node processes each, $cpus_per_task CPUs per process, GPUs per node: ${SLURM_GPUS_ON_NODE:-none, it runs on CPU}"

# Variables of a task are expanded inside the task. --wait: once one task has ended, the others follow within 30 seconds or are killed.
srun --ntasks="$tasks" --ntasks-per-node="$tasks_per_node" --cpus-per-task="$cpus_per_task" --wait=30 \
  bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"' task \
  "$PYTHON" -m mnistm_dist.train "${arguments[@]}" --expect-world-size "$tasks" &
srun_pid=$!

# The batch shell alone gets USR1, ahead of the time limit, and passes it on: srun forwards USR1, while TERM would make it kill. On
# TERM (scancel, preemption) Slurm signals the trainers itself.
requeue=no
trap 'requeue=yes; kill -USR1 $srun_pid' USR1
trap 'kill -USR1 $srun_pid' TERM

code=0
wait "$srun_pid" || code=$?
while kill -0 "$srun_pid" 2>/dev/null; do
  # A signal ended the wait, not srun.
  code=0
  wait "$srun_pid" || code=$?
done

if [ "$requeue" = yes ] && [ "$code" = 75 ]; then
  echo "job $SLURM_JOB_ID: saved before the time limit; requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
