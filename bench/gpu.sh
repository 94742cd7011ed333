#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Builds, tests, sanitizes, benchmarks and profiles the cuda backend where there is a GPU. It needs nvcc, and a Python with
# torch, pytest, hypothesis and numpy, but no network. Each part ends in time and leaves its log in the output folder.
set -euo pipefail

usage='usage: bench/gpu.sh [--build] [--test] [--sanitize] [--bench] [--peers] [--step] [--profile] [--limit SECONDS]
                    [--output DIR]

Without a part: all of them. A part may take SECONDS (520); benchmarks leave cases out rather than take longer. DIR is
bench/results unless given. PYTHON names the interpreter (python3).'

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=$root/bench/results
limit=520
parts=()
while (($#)); do
  case $1 in
    --build | --test | --sanitize | --bench | --peers | --step | --profile) parts+=("${1#--}") ;;
    --limit)
      [[ ${2-} =~ ^[1-9][0-9]*$ ]] || { echo "$usage" >&2; exit 2; }
      limit=$2
      shift
      ;;
    --output)
      (($# > 1)) || { echo "$usage" >&2; exit 2; }
      output=$(realpath -m "$2")
      shift
      ;;
    --help)
      echo "$usage"
      exit
      ;;
    *)
      echo "$usage" >&2
      exit 2
      ;;
  esac
  shift
done
((${#parts[@]})) || parts=(build test sanitize bench peers step profile)

python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd "$root"

# Prints the GPU's compute capability as TORCH_CUDA_ARCH_LIST wants it, or says what is missing.
check='
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"bench/gpu.sh: no torch for {sys.executable}: {error}")
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    sys.exit(f"bench/gpu.sh: torch must be 2.10 or later, got {torch.__version__}")
if not torch.cuda.is_available():
    sys.exit(f"bench/gpu.sh: no GPU: torch.cuda.is_available() is False (torch {torch.__version__})")
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}{chr(97) if major >= 9 else str()}")
'
arch=$("$python" -c "$check")
command -v nvcc > /dev/null || { echo "bench/gpu.sh: no nvcc on PATH or in \$CUDA_HOME/bin" >&2; exit 1; }
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}

# pytest without the plugins that the project's own options need, and without one that does not like several processes.
pytest=("$python" -m pytest -p no:cacheprovider -p no:benchmark -o 'addopts=-q --strict-markers')
export GRADSURGERY_REQUIRE=cuda GRADSURGERY_TEST_DEVICE=cuda

within() { timeout --signal=INT --kill-after=10 "$@"; }

part_build() {
  nvcc --version | tail -n 2
  GRADSURGERY_BUILD=cuda within "$limit" "$python" setup.py build_ext --inplace
  "$python" -c 'import gradsurgery; print(gradsurgery.backends())'
}

part_test() {
  # Tests wait for the host and for compilers more than for the GPU: several at a time, where pytest-xdist is there.
  local workers=()
  ! "$python" -c 'import xdist' 2> /dev/null || workers=(--numprocesses auto --maxprocesses 12 --dist worksteal)
  within "$limit" "${pytest[@]}" "${workers[@]}" tests -rfEs
}

part_sanitize() {
  local tool option failed=0 ours=() running=()
  # Our kernels alone, by whichever option this version has; else all.
  for option in --kernel-regex --kernel-name --filter; do
    # "true" uses no GPU, which would be an error by itself.
    ! compute-sanitizer --require-cuda-init no "$option" kns=gs3gpu true > /dev/null 2>&1 ||
      { ours=("$option" kns=gs3gpu); break; }
  done
  local options=(--error-exitcode 99 --launch-timeout 0 --report-api-errors no)
  # Side by side: each keeps one processor busy.
  for tool in memcheck racecheck initcheck synccheck; do
    local filter=("${ours[@]}") settings=(env)
    # Without torch's cache each tensor is an allocation of its own, whose bounds and contents the tool knows.
    [[ $tool != @(memcheck|initcheck) ]] || settings+=(PYTORCH_NO_CUDA_MEMORY_CACHING=1)
    # initcheck has to see torch's kernels write what ours read.
    [[ $tool != initcheck ]] || filter=()
    within "$limit" "${settings[@]}" compute-sanitizer --tool "$tool" "${options[@]}" "${filter[@]}" \
      "${pytest[@]}" tests/test_cuda_kernels.py -k sanitize > "$output/gpu-sanitize-$tool.log" 2>&1 &
    running+=("$tool $!")
  done
  for tool in "${running[@]}"; do
    local status=0
    wait "${tool#* }" || status=$?
    echo "== ${tool% *}"
    cat "$output/gpu-sanitize-${tool% *}.log"
    ((status == 0)) || { echo "== ${tool% *} failed: $status"; failed=1; }
  done
  return "$failed"
}

# The rest of the time is for what runs before the first case and ends after the last one.
part_bench() { within "$limit" "$python" -m bench.gpu_stages --budget "$((limit * 4 / 5))" --output "$output"; }

part_peers() { within "$limit" "$python" -m bench.gpu_peers --budget "$((limit * 4 / 5))" --output "$output"; }

# Four models with some ten contenders.
part_step() {
  within "$limit" "$python" -m bench.step --device cuda --seconds "$((limit < 130 ? 1 : limit / 130))" --output "$output"
}

part_profile() {
  local sections=(SpeedOfLight LaunchStats Occupancy WarpStateStats MemoryWorkloadAnalysis ComputeWorkloadAnalysis)
  within "$limit" ncu --clock-control none --profile-from-start off "${sections[@]/#/--section=}" --nvtx --csv --page raw \
    --log-file "$output/gpu-profile.csv" "$python" -m bench.gpu_profile --output "$output"
}

mkdir -p "$output"
nvidia-smi -L 2> /dev/null || true
summary=() failures=0
for part in "${parts[@]}"; do
  echo "=== $part"
  begin=$SECONDS
  # Not in a condition, which would let the part go on after an error.
  set +e
  (
    set -e
    "part_$part"
  ) 2>&1 | tee "$output/gpu-$part.log"
  status=${PIPESTATUS[0]}
  set -e
  word=ok
  ((status == 0)) || { word="failed ($status)" failures=$((failures + 1)); }
  summary+=("$(printf '%-9s %-13s %4d s' "$part" "$word" "$((SECONDS - begin))")")
done
printf '%s\n' '=== summary' "${summary[@]}"
exit "$((failures > 0))"
