#!/usr/bin/env bash
# Create or update .venv at the repository's root: ringflex itself (editable) with its extras.
#
#   bash scripts/setup.sh [EXTRA...]     extras on top of test and train, e.g. dev
#
# Without an NVIDIA GPU the pins of constraints-cpu.txt apply, and torch is its CPU build. An extra
# that is already installed from the same pyproject.toml and constraints is not installed again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/pip ]; then
    python3 -m venv .venv
fi

constraints=(-c constraints-cpu.txt)
if nvidia-smi -L >/dev/null 2>&1; then
    constraints=()
fi

# One stamp per extra holds the checksum of what decided its versions.
wanted=$(cat pyproject.toml constraints-cpu.txt <(echo "${constraints[*]-} $PWD") | cksum)
mkdir -p .venv/stamps
stale=()
for extra in test train "$@"; do
    if [ "$(cat ".venv/stamps/$extra" 2>/dev/null)" != "$wanted" ]; then
        stale+=("$extra")
    fi
done
if [ ${#stale[@]} -eq 0 ]; then
    exit 0
fi

extras=$(IFS=,; echo "${stale[*]}")
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() {
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off \
        "${constraints[@]+"${constraints[@]}"}" "$@" -e ".[$extras]" >"$log" 2>&1
}
fail() {
    cat "$log" >&2
    echo "could not install ringflex[$extras]; pip's reason is above" >&2
    exit 1
}

echo "installing ringflex[$extras] into .venv ..."
if ! install; then
    grep -qE "No matching distribution found for torch|\(constraint\) torch" "$log" || fail
    # The usual package index has no CPU builds for Linux; PyTorch's own one does.
    echo "no CPU build of torch found; trying again with PyTorch's own package index ..."
    install --extra-index-url https://download.pytorch.org/whl/cpu || fail
fi
for extra in "${stale[@]}"; do
    echo "$wanted" >".venv/stamps/$extra"
done
