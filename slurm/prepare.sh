#!/usr/bin/env bash
# Documents to shards: an array of workers that share the work, without GPUs.
#   sbatch slurm/prepare.sh recipe=NAME [overrides…]
#   sbatch --array=0-31 slurm/prepare.sh …      more workers; the numbers must be consecutive
#SBATCH --job-name=prepare
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

# sbatch runs a copy of this file: Slurm knows where it came from
: "${ALLMEM_HOME:=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null |
    sed -n '/^ *Command=/{s///;s|/slurm/[^/ ]*\.sh.*||p;q}')}"
# shellcheck source=slurm/common.sh
source "${ALLMEM_HOME:=$(cd "$(dirname "$0")/.." && pwd)}/slurm/common.sh" || {
    echo "error: ALLMEM_HOME=$ALLMEM_HOME is not the project: sbatch PROJECT/slurm/prepare.sh, or set ALLMEM_HOME to its folder" >&2
    exit 2
}

min=${SLURM_ARRAY_TASK_MIN:-0} max=${SLURM_ARRAY_TASK_MAX:-0} count=${SLURM_ARRAY_TASK_COUNT:-1}
((max - min + 1 == count)) ||
    allmem_fail "--array has $count tasks between $min and $max; their numbers must be consecutive: --array=0-$((count - 1))"
allmem_run stage=prepare recipe=qwen3_8b \
    "data.num_workers=$count" \
    "data.worker_rank=$((${SLURM_ARRAY_TASK_ID:-0} - min))" -- "$@"
