#!/usr/bin/env bash
# One whole visit to a GPU machine, stage by stage. Works from a checkout, without a network, with what is installed there
# (torch >= 2.11, triton >= 3.6, nvcc, cmake, ninja, pybind11, pytest, pytest-benchmark).
#
#   benchmarks/run_gpu.sh [--dry-run] [stage ...]        stages: build tests fusions verify tune sanitize layers bench networks;
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
    build | tests | fusions | verify | tune | sanitize | layers | bench | networks) stages+=("$argument") ;;
    *) echo "unknown stage '$argument': build tests fusions verify tune sanitize layers bench networks" >&2; exit 2 ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || stages=(build tests fusions verify tune sanitize layers bench networks)

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

# Triton compiles on the CPU and shares what it compiled through its cache folder: many processes, where pytest-xdist is
# installed, each taking one test at a time, the longest first. gpu-failures.txt and gpu-kernels.json are written as tests end.
stage_tests() {
  local selection=(tests/gpu) parallel=()
  if [ "$FASTCNN_REHEARSE" = 1 ]; then selection=(tests/gpu -k "(awkward and fp32 and plain) or nan or no_images"); fi
  if python -c "import xdist" 2>/dev/null; then
    parallel=(-n "${TEST_PROCESSES:-12}" --dist load --maxschedchunk 1)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
  fi
  pytest "${selection[@]}" "${parallel[@]}" -p no:benchmark -p no:cacheprovider -q --tb=short --durations=20 \
    --junitxml="$OUT/gpu-tests.xml"
}

# What freezing chooses by its own times: operators in one kernel, early starts, branches on streams.
stage_fusions() {
  export PYTHONPATH="$PWD/benchmarks"
  local status=0
  if [ "$FASTCNN_REHEARSE" = 1 ]; then
    python benchmarks/measure_gpu_pairs.py --rehearse --out "$OUT/gpu-pairs.json"
    return
  fi
  python benchmarks/measure_gpu_networks.py --networks resnet50,densenet121 --candidates eager_graph,fastcnn_frozen \
    --deadline 60 --output "$OUT/gpu-frozen.json" || status=1
  python benchmarks/measure_gpu_pairs.py --batches 256 --rounds 5 --out "$OUT/gpu-pairs.json" || status=1
  python benchmarks/measure_gpu_early_starts.py --output "$OUT/gpu-early-starts.json" || status=1
  return $status
}

# Every network in four precisions by fastcnn's own choice of kernels, each precision in three processes; then some by each
# backend, where most of the time goes into compiling Triton kernels.
stage_verify() {
  local networks=(resnet50 resnext50_32x4d resnet18 resnet20_cifar) backends=(triton cuda) parts=3 part
  export NAMES="$(fastcnn list --json | python -c 'import json, sys; print(*(one["name"] for one in json.load(sys.stdin)))')"
  if [ "$FASTCNN_REHEARSE" = 1 ]; then
    networks=(resnet20_cifar) backends=(cpp) parts=1 NAMES="resnet20_cifar plain20_cifar"
  fi
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
  {
    for precision in fp32 tf32 bf16 fp16; do
      for ((part = 0; part < parts; part++)); do echo "any $precision all-$part-$parts"; done
    done
    for backend in "${backends[@]}"; do
      for network in "${networks[@]}"; do
        for precision in fp32 bf16 fp16; do echo "$backend $precision $network"; done
      done
    done
  } | xargs -L 1 -P "${VERIFY_PROCESSES:-12}" bash -c 'verify_one "$@"' _
}

verify_one() {  # backend precision network; or any precision all-PART-PARTS
  local options=(--dtype "$2" --no-tf32) networks=("$3") file="$OUT/verify-$1-$2-$3" part parts
  if [ "$2" = tf32 ]; then options=(--dtype fp32 --tf32); fi
  if [ "$1" != any ]; then options+=(--backend "$1"); fi
  if [ "$FASTCNN_REHEARSE" = 1 ]; then options+=(--size 16); fi
  if [[ "$3" == all-* ]]; then
    IFS=- read -r _ part parts <<<"$3"
    mapfile -t networks < <(tr ' ' '\n' <<<"$NAMES" | awk -v part="$part" -v parts="$parts" 'NR % parts == part')
  fi
  if fastcnn verify "${networks[@]}" "${options[@]}" --json >"$file.json" 2>"$file.txt"; then
    echo "ok: $*: ${#networks[@]} networks"
    rm -f "$file.txt"
  else
    echo "FAILED: $*: $(tail -n 1 "$file.txt") $file.json"
    return 1
  fi
}

# In the order of importance; after each network, choices.json holds all choices so far, ready to ship with the package.
stage_tune() {
  local networks=(resnet50 densenet121 googlenet vgg16 resnext50_32x4d wide_resnet50_2 resnet18 alexnet_owt)
  local options=(--dtype bf16 --batch 1,32,256 --effort quick)
  if [ "$FASTCNN_REHEARSE" = 1 ]; then networks=(resnet20_cifar) options=(--size 16); fi
  for network in "${networks[@]}"; do
    fastcnn tune "$network" "${options[@]}" --export "$OUT/choices.json" || return 1
  done
  fastcnn tune --show | tee "$OUT/tuned.txt"
}

# compute-sanitizer, which slows everything 10 to 50 times, over a few awkward shapes, where an access out of bounds would
# be. Side by side, each in one process: our CUDA kernels (and not PyTorch's, which compute the references) under memcheck and
# racecheck, all kernels of a Triton selection under memcheck. racecheck does not know how Triton's pipelines synchronise, and
# breaks down ("failed to handle a hardware exception") in the kernels with bulk copies, which have a job of their own.
stage_sanitize() {
  local sanitizer status=0 job jobs=() small="1x17x13x11 and bf16"
  local awkward="awkward and fused and (1x24x9x9 or 1x3x33x29 or 2x64x6x6 or 1x24x6x6 or 1x520x4x4)"
  declare -A ours=(
    [memcheck]="cuda and (($awkward) or ($small) or (each_kernel and 3x72x19x17 and bf16))"
    [racecheck]="cuda and (($awkward and bf16 and not 1x520x4x4) or (each_kernel and 3x72x19x17 and tf32) or ($small))"
    [racecheck-bulk]="cuda and each_kernel and 2x128x15x33 and bf16 and plain"
    [memcheck-triton]="triton and (($awkward and bf16) or ($small))"
  )
  if [ "$FASTCNN_REHEARSE" = 1 ]; then
    for job in "${!ours[@]}"; do  # each selection must select something
      FASTCNN_REHEARSE=0 pytest tests/gpu -q --collect-only -k "${ours[$job]}" | tail -n 1 || status=1
    done
    return $status
  fi
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
  if [ -z "$sanitizer" ]; then echo "compute-sanitizer is not installed here"; return 1; fi
  for job in "${!ours[@]}"; do
    local filter=(--kernel-name kns=fastcnn)
    if [ "$job" = memcheck-triton ]; then filter=(); fi
    OUT= timeout "${SANITIZE_SECONDS:-100}" "$sanitizer" --tool "${job%-*}" "${filter[@]}" --error-exitcode 9 \
      --log-file "$OUT/$job.log" "$(command -v python)" -m pytest tests/gpu -p no:benchmark -p no:cacheprovider -p no:xdist \
      -q --tb=short -k "${ours[$job]}" >"$OUT/$job.tests.log" 2>&1 &
    jobs+=("$job:$!")
  done
  for job in "${jobs[@]}"; do
    wait "${job#*:}"
    local code=$?
    echo "${job%%:*}: exit status $code (9: the tool found an error, 124: out of time)"
    tail -n 2 "$OUT/${job%%:*}.log" "$OUT/${job%%:*}.tests.log"
    [ $code = 0 ] || status=1
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

# Whole networks against eager mode and torch.compile, each in CUDA graphs: batches 1 and 32 of all, then 256 of a half of
# them at a time, then ResNet-50 at 256 beside max-autotune, whose tuning takes up to 24 s a shape. inductor_autotuned/ is
# what inductor has found out of it so far on an H100 with torch 2.11 (TORCHINDUCTOR_CACHE_DIR/cache): another version or
# device passes it over. Keep that folder from one visit to the next, and tuning goes on where it was.
stage_networks() {
  export PYTHONPATH="$PWD/benchmarks" TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$OUT/inductor}"
  local status=0 compared=eager_graph,compile_graphs,fastcnn_frozen prepare="${PREPARE_SECONDS:-120}"
  local halves=(resnet50,densenet121,googlenet,resnext50_32x4d:256 vgg16,wide_resnet50_2,resnet18,resnet152,alexnet_owt:256)
  if [ "$FASTCNN_REHEARSE" = 1 ]; then
    python benchmarks/measure_gpu_networks_in_waves.py --rehearse --rounds 5 --prepare 20
    return
  fi
  mkdir -p "$TORCHINDUCTOR_CACHE_DIR/cache" && cp -n benchmarks/inductor_autotuned/* "$TORCHINDUCTOR_CACHE_DIR/cache/"
  python benchmarks/measure_gpu_networks_in_waves.py --waves all:1,32 "${halves[@]}" --candidates "$compared" \
    --seconds 1.5 --prepare "$prepare" --deadline "${NETWORKS_SECONDS:-360}" || status=1
  python benchmarks/measure_gpu_networks_in_waves.py --waves resnet50:256 --candidates "$compared,compile,compile_max_autotune" \
    --seconds 1.5 --prepare 140 --deadline "${AUTOTUNE_SECONDS:-160}" || status=1
  return $status
}

# ---- the visit ----------------------------------------------------------------------------------------------------

export FASTCNN_REHEARSE=${FASTCNN_REHEARSE:-0}
export -f stage_build stage_tests stage_fusions stage_verify verify_one stage_tune stage_sanitize stage_bench stage_layers stage_networks
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
  tail -n "$([ "$stage" = networks ] && echo 100 || echo 15)" "$OUT/$stage.log"
  if [ "$stage" = tests ] && [ -s "$OUT/gpu-failures.txt" ]; then
    echo "-- failures (all of them: $OUT/gpu-failures.txt)"
    grep -E "^(tests|E  )" "$OUT/gpu-failures.txt" | cut -c 1-220 | head -n 60
  fi
  printf '%-10s %-14s %4ds\n' "$stage" "$verdict" $((SECONDS - begin)) | tee -a "$OUT/summary.txt"
done
echo "== summary" && cat "$OUT/summary.txt"
exit $failed
