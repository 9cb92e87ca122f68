#!/usr/bin/env bash
# The conversion of docs/results.md on one GPU: memory and Mamba-2 trained alike, then measured.
#
#   bash benchmarks/gpu_conversion.sh [OUT] [--budget-s SECONDS] [--run-dir DIR] [OVERRIDE ...]
#
# Runs `python -m pipeline.run stage=all recipe=smollm2_135m_gpu` in runs/gpu_conversion (--run-dir)
# for at most --budget-s (default 1500) and copies what is measured so far to OUT (default
# runs/bench_gpu/conversion): results.json, table.md, plots, the losses, the logs, and the trained memory.
# A run that the budget ends has a checkpoint: the same command goes on. Give 540 where a command
# may run ten minutes. OVERRIDEs are settings of the pipeline, parallel.device=cpu recipe=tiny for a
# trial. Installs nothing: PYTHON (default .venv/bin/python where it is, else python3). The weights
# are fetched beforehand: python -m pipeline.fetch smollm2_135m --out models/smollm2_135m
set -uo pipefail
cd "$(dirname "$0")/.." || exit

out=runs/bench_gpu/conversion budget=1500 run=runs/gpu_conversion
words=()
while [ $# -gt 0 ]; do
  case "$1" in
    --budget-s) budget="$2"; shift 2 ;;
    --run-dir) run="$2"; shift 2 ;;
    -h|--help) sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    -*) echo "error: $1 is no option; see bash $0 --help" >&2; exit 2 ;;
    *=*) words+=("$1"); shift ;;
    *) out="$1"; shift ;;
  esac
done
default=python3
[ -x .venv/bin/python ] && default=.venv/bin/python
python="${PYTHON:-$default}"
mkdir -p "$out"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

# SIGTERM makes the pipeline write a checkpoint and end; what hangs after it is killed.
timeout --kill-after=45 "$((budget > 120 ? budget - 60 : 60))" "$python" -m pipeline.run stage=all \
  recipe=smollm2_135m_gpu "run.dir=$run" tracking=none ${words[@]+"${words[@]}"} 2>&1 | tee -a "$out/run.log"
code=${PIPESTATUS[0]}

for name in convert convert_mamba2; do
  [ -f "$run/$name/metrics.jsonl" ] && cp "$run/$name/metrics.jsonl" "$out/$name.jsonl"
done
for file in evaluate/results.json evaluate/table.md evaluate/plots/summary.png; do
  [ -f "$run/$file" ] && cp "$run/$file" "$out/"
done
newest=$(find "$run/convert/checkpoints" -name model.safetensors 2> /dev/null | sort | tail -n 1)
if [ -f "$run/export/DONE.json" ] && [ -n "$newest" ]; then
  cp "$newest" "$out/memory.safetensors"
fi
if [ "$code" -eq 0 ]; then
  echo "complete: $out"
else
  echo "not complete (exit status $code): the same command goes on; so far: $out"
fi
exit "$code"
