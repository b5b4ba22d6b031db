#!/usr/bin/env bash
# The demo: builds what ships, starts a daemon on a free loopback port, streams the real traces of tests/data through it in every
# profile, fetches, decodes and attends, restarts the daemon, checks that nothing changed, prints one table and stops everything.
#   deploy/demo.sh
# On a Debian 12 machine it installs the packages that are missing (deploy/packages.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=deploy/packages.sh
source deploy/packages.sh

readonly PROFILES=(raw fp8 tq2 tq3 tq4 eoptshrinkq2 kvs2 kvs2t kvs3 kvs3t kvs4)
readonly BIN=build/release/bin
WORK="$(mktemp -d)"
DAEMON=
SERVER=

say() { printf '%s\n' "$*" >&2; }

stop_daemon() {
  if [[ -n "$DAEMON" ]]; then
    kill "$DAEMON" 2>/dev/null || true
    wait "$DAEMON" || { say "kvshrinkd failed; its log:"; cat "$WORK/log" >&2; return 1; }
    DAEMON=
  fi
}

clean_up() {
  stop_daemon || true
  rm -rf "$WORK"
}
trap clean_up EXIT

start_daemon() {
  rm -f "$WORK/ports"
  "$BIN/kvshrinkd" --listen 127.0.0.1:0 --http 127.0.0.1:0 --port-file "$WORK/ports" --data-dir "$WORK/data" 2>>"$WORK/log" &
  DAEMON=$!
  local i
  for ((i = 0; i < 100; ++i)); do
    [[ -s "$WORK/ports" ]] && break
    kill -0 "$DAEMON" 2>/dev/null || { say "kvshrinkd ended at once; its log:"; cat "$WORK/log" >&2; exit 1; }
    sleep 0.1
  done
  SERVER="$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["listen"])' "$WORK/ports")"
}

client() {
  local command="$1"
  shift
  "$BIN/kvshrink" "$command" "$@" --server "$SERVER"
}

build() {
  install_build_packages >&2
  install_packages python3 >&2
  cmake --preset release >"$WORK/configure" || { cat "$WORK/configure" >&2; exit 1; }
  say "Building (a few minutes the first time)"
  cmake --build --preset release --target kvshrinkd kvshrink_cli >&2
}

# Puts, fetches, decodes and attends one trace in one profile; leaves JSON files in $WORK/results.
run_profile() {
  local trace="$1" profile="$2" name id
  name="$(basename "$trace" .safetensors)"
  id="$name.$profile"
  local run=(--namespace "$name" --prefix "$profile")
  client put "$trace" "${run[@]}" --profile "$profile" --json >"$WORK/results/$id.put.json"
  client get "${run[@]}" --out "$WORK/fetched/$id.kvs" --trace "$trace" --json >"$WORK/results/$id.get.json"
  client get "${run[@]}" --out "$WORK/fetched/$id.safetensors" --form decoded --json >/dev/null
  client attend "$trace" "${run[@]}" --json >"$WORK/results/$id.attend.json"
  "$BIN/kvshrink" verify "$WORK/fetched/$id.kvs" >/dev/null
}

# After the restart: the same bytes, now from disk.
check_profile() {
  local trace="$1" profile="$2" name id
  name="$(basename "$trace" .safetensors)"
  id="$name.$profile"
  client get --namespace "$name" --prefix "$profile" --out "$WORK/again.kvs" --trace "$trace" --json >"$WORK/results/$id.again.json"
  cmp "$WORK/again.kvs" "$WORK/fetched/$id.kvs"
  python3 deploy/demo_table.py --check-tier disk "$WORK/results/$id.again.json"
}

build
mkdir -p "$WORK/results" "$WORK/fetched"
start_daemon
say "kvshrinkd serves on $SERVER"
traces=(tests/data/*.safetensors)
for trace in "${traces[@]}"; do
  say "Measuring $(basename "$trace") in ${#PROFILES[@]} profiles"
  "$BIN/kvshrink" eval "$trace" --profile "$(IFS=,; echo "${PROFILES[*]}")" --json \
    >"$WORK/results/$(basename "$trace" .safetensors).eval.json"
  for profile in "${PROFILES[@]}"; do
    run_profile "$trace" "$profile"
  done
done

say "Restarting the daemon"
stop_daemon
start_daemon
for trace in "${traces[@]}"; do
  for profile in "${PROFILES[@]}"; do
    check_profile "$trace" "$profile"
  done
done
say "After the restart every chunk came back from disk, byte for byte"
stop_daemon

python3 deploy/demo_table.py "$WORK/results"
