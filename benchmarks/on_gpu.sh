#!/usr/bin/env bash
# Everything that needs a GPU, in one call: builds in place for the card at hand, runs the whole test suite on it,
# the kernels' drivers by themselves and under compute-sanitizer, then the speed benchmarks, their plots, and the
# predictions beside them. Leaves logs and JSON in the folder $OUT (default benchmarks/results/<card>). Needs torch
# with CUDA, nvcc of the same major version, cmake, ninja and pybind11; nothing is downloaded. Every step runs even
# if one before it failed; the exit code says whether any did.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"  # nvcc, compute-sanitizer
CARD=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().replace(' ', '_'))") || {
  echo "on_gpu.sh: no GPU that torch can use" >&2
  exit 1
}
OUT=${OUT:-benchmarks/results/$CARD}
mkdir -p "$OUT"
failed=0

step() {  # step NAME COMMAND...: its output goes to $OUT/NAME.log, the last lines here
  local name=$1 begin=$SECONDS status=ok
  shift
  "$@" > "$OUT/$name.log" 2>&1 || { status=FAILED; failed=1; }
  echo "=== $name: $status, $((SECONDS - begin)) s"
  tail -n 8 "$OUT/$name.log"
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  git rev-parse HEAD 2> /dev/null || echo "no git commit at hand"
  "$PYTHON" -c "import torch, sys; print(sys.version, torch.__version__, torch.version.cuda)"
}

build() { REBASED_CUDA=1 REBASED_EMULATOR=1 "$PYTHON" setup.py build_ext --inplace; }

drivers() {
  cmake -S csrc/tests -B build/gpu_drivers -G Ninja -DCMAKE_BUILD_TYPE=Release -DCUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES=native && cmake --build build/gpu_drivers
}

each_driver() {  # each_driver COMMAND...: runs every gpu_* program behind COMMAND, with $arguments
  local driver result=0
  for driver in build/gpu_drivers/gpu_driver_{cuda,tensor_core,float32} build/gpu_drivers/gpu_emulator_primitives; do
    echo "$* $driver"
    "$@" "$driver" $arguments || { echo "FAILED: $driver"; result=1; }
  done
  return $result
}

every_case() { arguments="" each_driver env; }

# compute-sanitizer is slow: the fewest cases that launch every kernel
sanitizer() { arguments="1 thinned" each_driver compute-sanitizer --tool "$1" --error-exitcode 9; }

step machine machine
step build build
step tests "$PYTHON" -m pytest -q -m "" python_tests
step drivers drivers
step every_case every_case
for tool in memcheck racecheck initcheck synccheck; do
  step "$tool" sanitizer "$tool"
done
step main_job "$PYTHON" -m rebased_cuda --device cuda --json
step speed "$PYTHON" -m benchmarks.speed --device cuda --output "$OUT/speed.json"
step plot "$PYTHON" -m benchmarks.speed plot "$OUT/speed.json"
step predict "$PYTHON" -m benchmarks.speed.predict --json "$OUT/predictions.json" # beside what was just measured
exit $failed
