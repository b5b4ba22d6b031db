#!/usr/bin/env bash
# The GPU's tests on a machine that has one, from binaries built here: it needs a driver, and for the last step the CUDA Toolkit.
#
#   tests/gpu/run_on_device.sh HOST       builds, copies to HOST by ssh, runs there, brings back the benchmark's JSON
#   tests/gpu/run_on_device.sh pack DIR   builds and fills DIR (binaries, their libraries, traces, this script as DIR/run.sh)
#   DIR/run.sh [OUT]                      runs what was packed: tests, benchmark, compute-sanitizer; results go to OUT
set -euo pipefail

readonly TESTS=(test_gpu_attend test_gpu_decode test_gpu_encode)

pack() {
  local to="$1" root build binary
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
  build="$root/build/cuda"
  cmake -S "$root" --preset cuda -DBUILD_TESTING=ON >/dev/null
  cmake --build "$build" --target "${TESTS[@]}" kvshrink-gpu-bench kvshrink_cuda -j "$(nproc)"
  mkdir -p "$to/lib" "$to/tests/data"
  cp "$root"/tests/data/*.safetensors "$to/tests/data/"
  cp "${BASH_SOURCE[0]}" "$to/run.sh"
  cp "$build/bin/libkvshrink_cuda.so" "$to/"
  for binary in "${TESTS[@]}" kvshrink-gpu-bench; do
    cp "$build/bin/$binary" "$to/"
    # All but the C library, which has to be the machine's own.
    ldd "$build/bin/$binary" | awk '/=> \//{print $3}' | { grep -vE '/(libc|libm|libdl|librt|libpthread)\.' || true; } |
      xargs -r -I{} cp -n {} "$to/lib/"
  done
}

# One result: name, exit code.
tell() {
  if [[ "$2" -eq 0 ]]; then echo "ok      $1"; else echo "FAILED  $1 (exit code $2)"; fi
}

step() {
  local name="$1" code=0
  shift
  "$@" >"$OUT/$name.log" 2>&1 || code=$?
  tell "$name" "$code"
  if [[ "$code" -ne 0 ]]; then
    FAILED=1
    tail -n 30 "$OUT/$name.log"
  fi
}

run() {
  local here test tool
  here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
  OUT="$(mkdir -p "${1:-$here/results}" && cd "${1:-$here/results}" && pwd)"
  FAILED=0
  cd "$here"
  export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  for test in "${TESTS[@]}"; do
    step "$test" "./$test"
  done
  step bench ./kvshrink-gpu-bench --out "$OUT/gpu.json"
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
      step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 ./test_gpu_decode --gtest_filter='*Small*'
      step "$tool-attend" compute-sanitizer --tool "$tool" --error-exitcode 9 ./test_gpu_attend --gtest_filter='*Small*'
      step "$tool-encode" compute-sanitizer --tool "$tool" --error-exitcode 9 ./test_gpu_encode --gtest_filter='*OddBlocks*'
    done
  fi
  return "$FAILED"
}

if [[ "$(basename "$0")" == run.sh ]]; then
  run "$@"
elif [[ "${1:-}" == pack && $# -eq 2 ]]; then
  pack "$2"
elif [[ $# -eq 1 && "$1" != -* ]]; then
  directory="$(mktemp -d)"
  trap 'rm -rf "$directory"' EXIT
  pack "$directory"
  ssh "$1" 'rm -rf kvshrink-gpu && mkdir kvshrink-gpu'
  scp -qr "$directory/." "$1:kvshrink-gpu/"
  code=0
  ssh "$1" kvshrink-gpu/run.sh || code=$?
  scp -q "$1:kvshrink-gpu/results/gpu.json" build/ || true
  exit "$code"
else
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
