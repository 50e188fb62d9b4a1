#!/usr/bin/env bash
# Everything that needs a GPU, in one call, what is wanted most first: builds in place for the card at hand; runs the
# tests that it concerns and meanwhile the kernels' drivers, by themselves and under compute-sanitizer; then, with the
# card to itself, times every kernel, the speed benchmarks and the main job; plots, predictions. Needs torch with CUDA,
# nvcc of the same major version, cmake, ninja, pybind11 and what the tests need; nothing is downloaded. Every step runs
# even if one before it failed; the exit code says whether any failed or ran out of time. Optional, by environment:
#   OUT        folder for log.txt, tests.log, *.json and plots.tar.gz, whose old ones go; benchmarks/results/<card>
#   BUDGET     seconds for all of it; a step is stopped where its share ends, at most 10 s later. 0: no limit
#   QUICK=1    the short speed benchmarks
#   TESTS=all  after all else, the tests that need no GPU
#   DRIVERS    a folder with gpu_driver_* programs (csrc/tests/CMakeLists.txt), instead of building them
#   WHEELS     a folder of wheels to have for the speed benchmarks, like flash-linear-attention's
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"  # nvcc, compute-sanitizer
CARD=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().replace(' ', '_'))") || {
  echo "on_gpu.sh: no GPU that torch can use" >&2
  exit 1
}
OUT=$(realpath "${OUT:-benchmarks/results/$CARD}") WORK=$(mktemp -d) BUILT=${DRIVERS:-build/gpu_drivers}
export OUT WORK BUILT BUDGET=${BUDGET:-0}
mkdir -p "$OUT"
rm -f "$OUT"/{log.txt,tests.log,kernels.json,speed.json,main_job.json,plots.tar.gz,predictions.json}
running="" checks=""  # process ids

keep_log() {  # keep_log FILE
  { echo "=== $(basename "$1" .log)"; cat "$1"; } >> "$OUT/log.txt"
  rm "$1"
}

verdict() {  # verdict NAME STATUS SECONDS
  echo "=== $1: $2, $3 s; $SECONDS s in all" | tee -a "$OUT/log.txt"
  printf '%-12s %-16s %5d s\n' "$1" "$2" "$3" >> "$WORK/summary"
}

step() {  # step NAME SHARE COMMAND...: until SHARE percent of the budget are used; $SIGNAL then stops it
  local name=$1 limit=0 begin=$SECONDS status=ok
  if [ "$BUDGET" -gt 0 ]; then
    limit=$((BUDGET * $2 / 100 - SECONDS))
    if [ "$limit" -le 0 ]; then verdict "$name" "no time left" 0; return; fi
  fi
  shift 2
  # in the background a signal to this script need not wait for the step, but SIGINT would be ignored
  env --default-signal=INT timeout -s "${SIGNAL:-TERM}" -k 10 "$limit" bash -c '"$@"' step "$@" \
    > "$WORK/$name.log" 2>&1 &
  running=$!
  wait "$running" || status="FAILED ($?)"
  running=""
  if [ "$status" != ok ] && [ "$limit" -gt 0 ] && [ $((SECONDS - begin)) -ge "$limit" ]; then
    status="ran out of time"
  fi
  tail -n 5 "$WORK/$name.log"
  keep_log "$WORK/$name.log"
  verdict "$name" "$status" $((SECONDS - begin))
}

finish() {  # also where the script was told to stop: what the steps under way have said is kept
  for log in "$WORK"/*.log; do if [ -e "$log" ]; then keep_log "$log"; fi; done
  { echo; echo "$CARD, $SECONDS s, $OUT"; cat "$WORK/summary"; } | tee -a "$OUT/log.txt"
  rm -rf "$WORK"
}
trap 'kill $running $checks 2> /dev/null; exit 143' TERM INT
trap finish EXIT

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  git rev-parse HEAD 2> /dev/null || echo "no git commit at hand"
  "$PYTHON" -c "import torch, sys; print(sys.version, torch.__version__, torch.version.cuda)"
}

build() { REBASED_CUDA=1 REBASED_LINEINFO=1 REBASED_EMULATOR=0 "$PYTHON" setup.py build_ext --inplace; }

build_drivers() {
  cmake -S csrc/tests -B "$BUILT" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native &&
    cmake --build "$BUILT"
}

each_driver() {  # each_driver ARGUMENTS COMMAND...: every gpu_* program behind COMMAND, all at once
  local arguments driver running=() result=0
  read -ra arguments <<< "$1"
  for driver in "$BUILT"/gpu_*; do
    {
      set -o pipefail
      "${@:2}" "$driver" "${arguments[@]}" 2>&1 | sed -u "s/^/${driver##*/}: /" || { echo "FAILED: $driver"; exit 1; }
    } &
    running+=($!)
  done
  for driver in "${running[@]}"; do wait "$driver" || result=1; done
  return $result
}

tests() {  # tests EXPRESSION
  local cores parallel=()
  cores=$(nproc)
  if "$PYTHON" -c "import xdist" 2> /dev/null; then
    export OMP_NUM_THREADS=1
    parallel=(-n $((cores < 12 ? cores : 12)))
  fi
  "$PYTHON" -m pytest -q "${parallel[@]}" -k "$1" -m "" --tb=short -rf --timeout 120 python_tests 2>&1 |
    tee -ia "$OUT/tests.log"
  return "${PIPESTATUS[0]}"
}

main_job() { "$PYTHON" -m rebased_cuda --device cuda --json > "$OUT/main_job.json"; }

plots() {
  "$PYTHON" -m benchmarks.speed plot "$WORK/results/speed.json" && cd "$WORK/results" &&
    tar -czf "$OUT/plots.tar.gz" -- *.svg
}
export -f machine build build_drivers each_driver tests main_job plots

in_background() {  # little work for the CPU, but nothing may be timed beside it
  trap 'kill $running 2> /dev/null; exit 143' TERM
  if [ -z "${DRIVERS:-}" ]; then step drivers 40 build_drivers; fi
  step every_case 60 each_driver "" env
  for tool in memcheck racecheck initcheck synccheck; do  # slow: the fewest cases that launch every kernel
    step "$tool" 60 each_driver "1 thinned" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 10
  done
}

step machine 10 machine
in_background &
checks=$!
step build 40 build
SIGNAL=INT step tests 60 tests cuda  # then pytest still says what failed
wait "$checks"
checks=""
step kernels 72 "$PYTHON" -m benchmarks.kernels.profile --json "$OUT/kernels.json"
if [ -n "${WHEELS:-}" ]; then
  step wheels 74 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$WORK/site" "$WHEELS"/*.whl
  export PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ "${QUICK:-0}" = 1 ]; then quick=(--quick); else quick=(); fi
step speed 92 "$PYTHON" -m benchmarks.speed "${quick[@]}" --device cuda --output "$OUT/speed.json"
step main_job 97 main_job
mkdir "$WORK/results"  # what predictions start from, beside what was just measured
cp benchmarks/results/{kernel,traffic}*.json "$OUT/speed.json" "$WORK/results"
step plots 99 plots
step predict 100 "$PYTHON" -m benchmarks.speed.predict --results "$WORK/results" --json "$OUT/predictions.json"
if [ "${TESTS:-}" = all ]; then SIGNAL=INT step other_tests 100 tests "not cuda"; fi
[ "$(grep -c ' ok ' "$WORK/summary")" = "$(wc -l < "$WORK/summary")" ]
