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
: "${ALLMEM_HOME:=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null |
    sed -n '/^ *Command=/{s///;s|/slurm/[^/ ]*\.sh.*||p;q}')}"
# shellcheck source=slurm/common.sh
source "${ALLMEM_HOME:=$(cd "$(dirname "$0")/.." && pwd)}/slurm/common.sh" || {
    echo "error: ALLMEM_HOME=$ALLMEM_HOME is not the project: sbatch PROJECT/slurm/stage.sh, or set ALLMEM_HOME to its folder" >&2
    exit 2
}

allmem_run recipe=qwen3_8b -- "$@"
