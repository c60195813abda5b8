#!/usr/bin/env bash
# Compiles the Hopper kernels with other versions of Triton, each in a folder of its own.
#
#     bash scripts/compile_versions.sh 3.7.1 3.8.0    # by default 3.7.1, 3.8.0 and 3.9.0
#
# Needs no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- 3.7.1 3.8.0 3.9.0
bash scripts/setup.sh dev
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in "$@"; do
    .venv/bin/python -m pip install --quiet --no-deps --target "$folder/$version" "triton==$version"
    echo "triton $version"
    PYTHONPATH="$folder/$version" .venv/bin/python scripts/compile_kernels.py --only hopper
    rm -rf "${folder:?}/$version"
done
