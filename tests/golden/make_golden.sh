#!/usr/bin/env bash
# Makes tests/golden/data anew. Only when the format changes: these files are what older shards look like.
#
#   tests/golden/make_golden.sh [FOLDER OF kvshrink]     build/dev/bin by default
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec build/venv/bin/python tests/golden/make_golden.py "${1:-build/dev/bin}/kvshrink"
