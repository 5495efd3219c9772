#!/usr/bin/env bash
# One whole visit to a GPU machine, stage by stage. Works from a checkout, without a network, with what is installed there
# (torch >= 2.11, triton >= 3.6, nvcc, cmake, ninja, pybind11, pytest, pytest-benchmark).
#
#   benchmarks/run_gpu.sh [--dry-run] [stage ...]        stages: build tests verify tune sanitize layers bench;
#                                                        default: all
#
# Everything goes to $OUT (default: gpu-results/), one log a stage, written as it happens. A stage has nine minutes; one that
# fails or runs out of time does not stop the next. $OUT/summary.txt says how each ended; the exit status is 0 only if all passed.
# --dry-run rehearses every stage's logic on the CPU with tiny sizes.
set -u
cd "$(dirname "$0")/.."

dry_run=0
stages=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=1 ;;
    build | tests | verify | tune | sanitize | layers | bench) stages+=("$argument") ;;
    *) echo "unknown stage '$argument': build tests verify tune sanitize layers bench" >&2; exit 2 ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || stages=(build tests verify tune sanitize layers bench)

export OUT="${OUT:-$PWD/gpu-results}"
mkdir -p "$OUT"
limit=${STAGE_SECONDS:-540}
if [ $dry_run = 1 ]; then export FASTCNN_REHEARSE=1; fi
export PYTHONSAFEPATH=1  # the installed package, not the source tree
export FASTCNN_CACHE_DIR="${FASTCNN_CACHE_DIR:-$OUT/cache}"

# ---- stages: each is run in its own shell, under a time limit -------------------------------------------------------

stage_build() {
  if [ "$FASTCNN_REHEARSE" = 1 ]; then
    python -c "import fastcnn; print('using the installed fastcnn', fastcnn.__version__)"
  else
    FASTCNN_CUDA=1 python -m pip install --no-build-isolation --no-deps --force-reinstall -v . | grep -E "fastcnn:|Success|error|warning" || return 1
  fi
  fastcnn env --json >"$OUT/env.json" && fastcnn env
  if command -v nvidia-smi >/dev/null; then nvidia-smi; fi
}

stage_tests() {
  local selection=(tests/gpu)
  if [ "$FASTCNN_REHEARSE" = 1 ]; then selection=(tests/gpu -k "awkward and float32 and plain or nan"); fi
  # Triton compiles on the CPU: in parallel where pytest-xdist is installed.
  local parallel=()
  if python -c "import xdist" 2>/dev/null; then parallel=(-n "${TEST_PROCESSES:-8}"); fi
  pytest "${selection[@]}" "${parallel[@]}" -q -rs --junitxml="$OUT/gpu-tests.xml"
}

stage_verify() {
  local status=0 networks=(resnet18 resnet50 resnext50_32x4d resnet20_cifar) dtypes=(fp32 bf16 fp16) backends=(triton cuda)
  local size=()
  if [ "$FASTCNN_REHEARSE" = 1 ]; then networks=(resnet20_cifar) dtypes=(fp32) backends=(cpp) size=(--size 16); fi
  for backend in "${backends[@]}"; do
    for dtype in "${dtypes[@]}"; do
      fastcnn verify "${networks[@]}" --backend "$backend" --dtype "$dtype" "${size[@]}" --json \
        >"$OUT/verify-$backend-$dtype.json" || { status=1; echo "FAILED: $backend $dtype"; }
    done
  done
  return $status
}

stage_tune() {
  local networks=(resnet50 resnext50_32x4d) options=(--dtype bf16 --batch 32)
  if [ "$FASTCNN_REHEARSE" = 1 ]; then networks=(resnet20_cifar) options=(--size 16); fi
  for network in "${networks[@]}"; do fastcnn tune "$network" "${options[@]}" || return 1; done
  fastcnn tune --show | tee "$OUT/tuned.txt"
}

# memcheck and racecheck over the awkward shapes: small, and where an out-of-bounds access would be.
stage_sanitize() {
  if [ "$FASTCNN_REHEARSE" = 1 ]; then echo "compute-sanitizer needs a GPU"; return 0; fi
  local status=0
  for tool in memcheck racecheck; do
    compute-sanitizer --tool $tool --error-exitcode 9 --log-file "$OUT/$tool.log" \
      "$(command -v pytest)" tests/gpu/test_conv2d.py tests/gpu/test_other_operators.py -q -x \
      -k "(awkward and bfloat16 and fused) or (memory_bound and bfloat16)" || status=1
    tail -n 3 "$OUT/$tool.log"
  done
  return $status
}

# Every convolution of five networks and the memory-bound operators, for docs/performance-gpu.md.
stage_layers() {
  export PYTHONPATH="$PWD/benchmarks"
  local status=0 options=(--deadline "${LAYERS_SECONDS:-240}")
  if [ "$FASTCNN_REHEARSE" = 1 ]; then options+=(--rehearse); fi
  python benchmarks/measure_gpu_layers.py --operators "${options[@]}" --file "$OUT/gpu-operators.json" || status=1
  python benchmarks/measure_gpu_layers.py "${options[@]}" --file "$OUT/gpu-layers.json" || status=1
  return $status
}

stage_bench() {
  local selection=() rounds=()
  if [ "$FASTCNN_REHEARSE" = 1 ]; then selection=(-k "global_avg_pool or resnet20"); fi
  pytest benchmarks --benchmark-only -q "${selection[@]}" --benchmark-columns=median \
    --benchmark-json="$OUT/benchmarks.json" || return 1
}

# ---- the visit ----------------------------------------------------------------------------------------------------

export FASTCNN_REHEARSE=${FASTCNN_REHEARSE:-0}
export -f stage_build stage_tests stage_verify stage_tune stage_sanitize stage_layers stage_bench
{
  echo "commit ${FASTCNN_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}, $(date -u +%FT%TZ), rehearsal: $FASTCNN_REHEARSE"
} >"$OUT/summary.txt"
failed=0
for stage in "${stages[@]}"; do
  echo "== $stage"
  begin=$SECONDS
  timeout --kill-after=15 "$limit" bash -o pipefail -c "stage_$stage" >"$OUT/$stage.log" 2>&1
  code=$?
  case $code in
    0) verdict=passed ;;
    124 | 137) verdict="out of time" ;;
    *) verdict="FAILED ($code)" ;;
  esac
  [ $code = 0 ] || failed=1
  tail -n 15 "$OUT/$stage.log"
  printf '%-10s %-14s %4ds\n' "$stage" "$verdict" $((SECONDS - begin)) | tee -a "$OUT/summary.txt"
done
echo "== summary" && cat "$OUT/summary.txt"
exit $failed
