#!/usr/bin/env bash
# Any stage, by default on one GPU: collect, export, …
#   sbatch slurm/stage.sh stage=export recipe=NAME [overrides…]
#SBATCH --job-name=stage
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# sbatch runs a copy of this file: Slurm knows where it came from
ALLMEM_HOME=${ALLMEM_HOME:-$(scontrol show job -o "${SLURM_JOB_ID:-none}" 2>/dev/null |
    sed -n '1s|.* Command=\(.*\)/slurm/[^/]*\.sh.*|\1|p')}
# shellcheck source=slurm/common.sh
source "${ALLMEM_HOME:=$(dirname "$0")/..}/slurm/common.sh" || exit 2

allmem_run recipe=qwen3_8b -- "$@"
