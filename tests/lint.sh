#!/usr/bin/env bash
# Format, style and static checks of every file: the hooks of .pre-commit-config.yaml.
#
#   tests/lint.sh              all hooks on all files of the repository
#   tests/lint.sh tidy F...    one hook: clang-tidy on sources that build/dev compiles
#   tests/lint.sh types        one hook: mypy
#   tests/lint.sh length F...  one hook: files of one idea, below 400 lines
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/build/venv/bin:$PATH"
export PRE_COMMIT_HOME="$PWD/build/pre-commit"

# A file that hasn't changed since it was found clean, nor any header, isn't read again: its stamp says when.
tidy_one() {
  local source="$1" newest_header stamp output code=0
  stamp="build/tidy/${source//\//_}.ok"
  newest_header="$(cat build/tidy/newest_header)"
  if [[ "$stamp" -nt "$source" && "$stamp" -nt .clang-tidy && "$stamp" -nt "$newest_header" ]]; then
    return 0
  fi
  output="$(clang-tidy --quiet -p build/dev "$source" 2>&1)" || code=$?
  if [[ "$code" -ne 0 ]]; then
    grep -v -E '^[0-9]+ warnings? |^Suppressed |^Use -header-filter' <<<"$output" || true
    return 1
  fi
  touch "$stamp"
}

tidy() {
  if [[ ! -f build/dev/compile_commands.json ]]; then
    echo "build/dev/compile_commands.json is missing: run cmake --preset dev" >&2
    return 1
  fi
  mkdir -p build/tidy
  git ls-files -z '*.h' | xargs -0 ls -t | head -n 1 >build/tidy/newest_header
  printf '%s\0' "$@" | xargs -0 -P "$(nproc)" -n 1 tests/lint.sh tidy_one
}

# The folders are linted apart: their files are modules of the same names (conftest).
types() {
  (cd client/python && mypy)
  (cd tests/golden && mypy --strict .)
  (cd tests/e2e && MYPYPATH=../golden:../quality mypy --strict .)
  (cd tests/quality && mypy --strict .)
  mypy --strict tests/summary.py kernels/tools/train_trellis.py
}

length() {
  local file lines failed=0
  for file in "$@"; do
    lines="$(wc -l <"$file")"
    if [[ "$lines" -gt 400 ]]; then
      echo "$file has $lines lines: must be at most 400"
      failed=1
    fi
  done
  return "$failed"
}

case "${1:-all}" in
  all) pre-commit run --all-files --show-diff-on-failure --color never ;;
  tidy | tidy_one | types | length) "$@" ;;
  *)
    echo "usage: tests/lint.sh [tidy FILE...|types|length FILE...]" >&2
    exit 2
    ;;
esac
