#!/usr/bin/env bash
# Converts Qwen3-1.7B: all stages of the recipe that are not done yet, on one machine of 8 GPUs of 80 GB.
#   sbatch slurm/convert_qwen3_1_7b.sh [overrides…]      e.g. stage=convert convert.steps=100
#SBATCH --job-name=convert-qwen3-1.7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# sbatch runs a copy of this file: Slurm knows where it came from
: "${ALLMEM_HOME:=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null |
    sed -n '/^ *Command=/{s///;s|/slurm/[^/ ]*\.sh.*||p;q}')}"
# shellcheck source=slurm/common.sh
source "${ALLMEM_HOME:=$(cd "$(dirname "$0")/.." && pwd)}/slurm/common.sh" || {
    echo "error: ALLMEM_HOME=$ALLMEM_HOME is not the project: sbatch PROJECT/slurm/convert_qwen3_1_7b.sh, or set ALLMEM_HOME to its folder" >&2
    exit 2
}

allmem_run stage=all recipe=qwen3_1_7b -- "$@"
