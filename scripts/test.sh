#!/usr/bin/env bash
# Set up, then run the tests: two files at a time, but on GPUs one after the other.
#
#   bash scripts/test.sh [ARGUMENT OF pytest ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
workers=2
if nvidia-smi -L >/dev/null 2>&1; then
    workers=0
fi
exec .venv/bin/python -m pytest -n $workers --dist loadfile "$@"
