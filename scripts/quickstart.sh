#!/usr/bin/env bash
# Set up, then train a small model with ringflex on every GPU here, or on two CPU processes.
#
#   bash scripts/quickstart.sh [ARGUMENT OF scripts/train.py ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

ranks=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # what torchrun would set, without its warning
exec .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
    scripts/train.py "$@"
