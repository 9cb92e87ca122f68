#!/usr/bin/env bash
# Everything that needs a GPU, in one command: tests first, then speeds, what is worth most first.
#
#   bash benchmarks/gpu.sh [OUT] [--budget-s SECONDS] [--fresh] [--dry]
#
# OUT (default runs/bench_gpu) gets tests.log, sanitizer.log, kernels_gpu.json, models_gpu.json, their
# plots, targets.json and summary.txt. Results are written as they are measured: a run that is cut
# off keeps them, and the same command goes on with what is missing. --budget-s (default 1500) is for
# all parts together; give 540 where a command may run ten minutes. --dry runs every part on the CPU
# at tiny sizes. Installs nothing: PYTHON (default .venv/bin/python where it is, else python3) has
# PyTorch, Triton, transformers and pytest. What else is missing is named at the start, with what is
# then left out: the training step (megatron-core), a peer's row (fla), the figures (matplotlib).
set -uo pipefail
cd "$(dirname "$0")/.."

out=runs/bench_gpu budget=1500 dry="" fresh=""
while [ $# -gt 0 ]; do
  case "$1" in
    --budget-s) budget="$2"; shift 2 ;;
    --dry) dry=1; shift ;;
    --fresh) fresh=--fresh; shift ;;
    -h|--help) sed -n '2,12p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    -*) echo "error: $1 is no option; see bash benchmarks/gpu.sh --help" >&2; exit 2 ;;
    *) out="$1"; shift ;;
  esac
done
default=python3
[ -x .venv/bin/python ] && default=.venv/bin/python
python="${PYTHON:-$default}"
mkdir -p "$out"
start=$SECONDS
status=0
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

left() { echo $((budget - (SECONDS - start))); }
least() { echo $(($1 < $2 ? $1 : $2)); }
within() { timeout "$(($1 > 60 ? $1 : 60))" "${@:2}"; }  # a minute at least, to say what is missing
part() { echo; echo "== $1 ($(left) s left)"; }
done_before() { [ -z "$fresh" ] && [ -e "$out/$1.done" ] && echo "done before: $out/$1.log"; }
failed() { echo "FAILED: $1"; status=1; }

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }
missing=""
for package in torch triton transformers numpy pytest; do
  has $package || [ "$dry$package" = 1triton ] || missing="$missing $package"
done
if [ -n "$missing" ]; then
  echo "error: $python lacks$missing; install them, or name another Python: PYTHON=… bash $0" >&2
  exit 2
fi
has megatron || echo "no megatron-core: no training step, and only the tests that do without it"
has fla || echo "no flash-linear-attention (fla): its row is left out"
has matplotlib || echo "no matplotlib: no figures; draw them later by benchmarks.speed_plots"
has xdist || echo "no pytest-xdist: tests run one after the other"
headers="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')"
if [ -z "$dry" ] && ! { [ -e "$headers/Python.h" ] && command -v "${CC:-gcc}" cc clang > /dev/null; }; then
  echo "warning: no C compiler (gcc), or no $headers/Python.h: Triton builds its launchers with them"
fi

if [ -z "$dry" ]; then
  "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "error: $python sees no CUDA device; --dry runs the same on the CPU" >&2
    exit 2
  }
  device=cuda suffix=gpu kernels="" models=""
else
  device=cpu suffix=dry kernels="--tiny --no-compile --group-s 0.02"
  models="--tiny --repeat-s 0.02 --batches 1 --mixers allmem full training"
fi

part "tests on the device"
if ! done_before tests; then
  if [ -n "$dry" ]; then
    tests="tests/benchmarks/test_schedule.py"
  else
    # the folders whose tests need no other package than the kernels; the rest where Megatron is
    where="tests/kernels tests/allmem_hf tests/benchmarks"
    has megatron && where="tests"
    # only files with such tests: others may import what is not here
    tests="$(grep -rl --include='test_*.py' 'mark\.gpu' $where | sort | tr '\n' ' ')"
    tests="$tests -m gpu --continue-on-collection-errors"
    has xdist && tests="$tests -n 6"  # most of it is compiling
  fi
  within "$(least "$(($(left) / 2))" 420)" "$python" -m pytest $tests -q -p no:cacheprovider \
    > "$out/tests.log" 2>&1
  code=$?
  tail -n 15 "$out/tests.log"
  if [ $code -eq 0 ]; then
    touch "$out/tests.done"
  else
    failed "tests (exit status $code), see $out/tests.log"
  fi
fi

part "compute-sanitizer over every kernel"
if [ -n "$dry" ] || ! command -v compute-sanitizer > /dev/null; then
  echo "left out: no compute-sanitizer here, or a dry run" | tee "$out/sanitizer.log"
elif ! done_before sanitizer; then
  within "$(least "$(($(left) / 3))" 300)" "$python" -m tests.kernels.sanitize memcheck racecheck \
    > "$out/sanitizer.log" 2>&1
  code=$?
  tail -n 5 "$out/sanitizer.log"
  if [ $code -eq 0 ]; then
    touch "$out/sanitizer.done"
  else
    failed "compute-sanitizer (exit status $code), see $out/sanitizer.log"
  fi
fi

# Kernels get at most two fifths of what is left, so that a short run has models too.
part "kernels"
within "$(($(left) * 3 / 5))" "$python" -m benchmarks.kernels --device $device $kernels $fresh \
  --budget-s "$(($(left) * 2 / 5))" --out "$out/kernels_$suffix.json" || failed "kernels"
part "models"
within "$(left)" "$python" -m benchmarks.models --device $device $models $fresh \
  --budget-s "$(($(left) - 20))" --out "$out/models_$suffix.json" || failed "models"

part "targets"
"$python" -m benchmarks.targets --kernels "$out/kernels_$suffix.json" \
  --models "$out/models_$suffix.json" --out "$out/targets.json" | tee "$out/summary.txt"
echo
echo "results in $out after $((SECONDS - start)) s; to keep them: cp $out/*_$suffix.* $out/targets.json benchmarks/results/"
exit $status
