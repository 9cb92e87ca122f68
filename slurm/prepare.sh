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
ALLMEM_HOME=${ALLMEM_HOME:-$(scontrol show job -o "${SLURM_JOB_ID:-none}" 2>/dev/null |
    sed -n '1s|.* Command=\(.*\)/slurm/[^/]*\.sh.*|\1|p')}
# shellcheck source=slurm/common.sh
source "${ALLMEM_HOME:=$(dirname "$0")/..}/slurm/common.sh" || exit 2

allmem_run stage=prepare recipe=qwen3_8b \
    "data.num_workers=${SLURM_ARRAY_TASK_COUNT:-1}" \
    "data.worker_rank=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}))" -- "$@"
