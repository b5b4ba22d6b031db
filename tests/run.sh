#!/usr/bin/env bash
# The one test command: installs what is missing, builds, runs every test, and closes with one line of totals.
#
#   tests/run.sh              everything
#   KVSHRINK_FUZZ_SECONDS=5   seconds per fuzz target (30 by default)
#
# The log of it all is build/tests.log. Exit code: 0 when nothing failed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly FUZZ_SECONDS="${KVSHRINK_FUZZ_SECONDS:-30}"
readonly RESULTS=build/test-results
JOBS="$(nproc)"
STEP=0
readonly STEPS=8

# shellcheck source=deploy/packages.sh
source deploy/packages.sh

step() {
  STEP=$((STEP + 1))
  printf '\n==> [%d/%d, %d min] %s\n' "$STEP" "$STEPS" $((SECONDS / 60)) "$1"
}

# One result of a step that is not a ctest run: name, 0 or the exit code.
record() {
  echo "$1 $2" >>"$RESULTS/steps"
  if [[ "$2" -ne 0 ]]; then
    echo "FAILED: $1 (exit code $2)"
  fi
}

install_python() {
  if [[ ! -x build/venv/bin/python ]]; then
    python3 -m venv build/venv
  fi
  build/venv/bin/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
  build/venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e client/python
}

# A failed test is for the totals to tell, not for the shell to stop at.
run_ctest() {
  local preset="$1"
  shift
  ctest --test-dir "build/$preset" -j "$JOBS" --output-on-failure --no-tests=error \
    --test-output-size-passed 1000000 --test-output-size-failed 1000000 \
    --output-junit "$PWD/$RESULTS/$preset.xml" "$@" || true
}

# Each target starts from the seeds in the repository; what it finds beside them stays in build/.
run_fuzz() {
  local target name code
  for target in build/asan/bin/fuzz_*; do
    name="$(basename "$target")"
    mkdir -p "build/fuzz/$name"
    echo "--- $name, $FUZZ_SECONDS s"
    code=0
    "$target" -max_total_time="$FUZZ_SECONDS" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -verbosity=0 \
      -artifact_prefix="build/fuzz/$name-" "build/fuzz/$name" "tests/fuzz/corpus/${name#fuzz_}" || code=$?
    record "fuzz.$name" "$code"
  done
}

main() {
  local code=0
  rm -rf "$RESULTS"
  mkdir -p "$RESULTS"

  step "Packages of this machine"
  install_test_packages
  step "Python packages, in build/venv"
  install_python
  step "Build: preset dev"
  cmake --preset dev
  cmake --build --preset dev -j "$JOBS"
  step "Lint"
  tests/lint.sh || code=$?
  record lint "$code"
  step "Tests: unit, golden, end to end"
  run_ctest dev
  step "Build: preset asan (clang, AddressSanitizer, UndefinedBehaviorSanitizer)"
  cmake --preset asan
  cmake --build --preset asan -j "$JOBS" --target tests/unit/kernels/all tests/unit/store/all tests/fuzz/all
  step "Tests under the sanitizers: kernels, store"
  run_ctest asan -R '^unit\.(kernels|store)\.'
  step "Fuzz targets, $FUZZ_SECONDS s each"
  run_fuzz

  echo
  build/venv/bin/python tests/summary.py "$RESULTS" "$SECONDS"
}

mkdir -p build
main "$@" 2>&1 | tee build/tests.log
exit "${PIPESTATUS[0]}"
