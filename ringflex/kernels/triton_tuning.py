"""The search for the fastest tile (`kernel_options={"tune": True}`), and its memory on disk.

Findings are kept in `~/.cache/ringflex/tiles.json`: by GPU, Triton version, kernel, dtype, head
dims, block size, mods, and lengths up to a factor of two.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from ringflex.kernels.contract import Tile
from ringflex.kernels.triton_mods import ScoreMod
from ringflex.kernels.triton_setup import Setup
from ringflex.kernels.triton_tiles import CANDIDATES, fit_blocks

FINDINGS = Path.home() / ".cache" / "ringflex" / "tiles.json"
_REPEATS = 5


def fastest_tile(
    kernel: str,
    run: Callable[[Tile], None],
    default: Tile,
    setup: Setup,
    score: ScoreMod | None,
) -> Tile:
    """The fastest of the candidates for this launch; measured once per kind, then remembered."""
    if setup.where.name == "interpreter":
        return default
    name = _name(kernel, setup, score)
    known = _read()
    if name not in known:
        candidates = _candidates(kernel, default, setup)
        times = [_time(run, tile) for tile in candidates]
        known = _read()  # another process may have written meanwhile
        known[name] = list(candidates[times.index(min(times))])
        _write(known)
    return Tile(*known[name])


def _candidates(kernel: str, default: Tile, setup: Setup) -> list[Tile]:
    fitting = [fit_blocks(tile, setup.mask.block_size) for tile in CANDIDATES[kernel]]
    return list(dict.fromkeys([default, *fitting]))


def _name(kernel: str, setup: Setup, score: ScoreMod | None) -> str:
    mods = [setup.mask_mod.function, None if score is None else score.function()]
    names = [getattr(fn, "__name__", "-") for fn in mods]
    lengths = [n.bit_length() for n in setup.lengths[:2]]
    described = (
        torch.cuda.get_device_name(), triton.__version__, kernel, str(setup.dtype), setup.dims,
        setup.mask.block_size, setup.group, names, lengths,
    )  # fmt: skip
    return json.dumps(described)


def _time(run: Callable[[Tile], None], tile: Tile) -> float:
    """Median milliseconds; infinite for what does not fit on the device."""
    try:
        run(tile)
    except OutOfResources:
        return float("inf")
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(tile)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def _read() -> dict[str, list[int]]:
    try:
        known: dict[str, list[int]] = json.loads(FINDINGS.read_text())
    except (OSError, ValueError):
        return {}
    return known


def _write(known: dict[str, list[int]]) -> None:
    """In one stroke, so that a reader never sees half a file; not at all if the disk refuses."""
    with contextlib.suppress(OSError):
        FINDINGS.parent.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=FINDINGS.parent, suffix=".json")
        with os.fdopen(handle, "w") as file:
            json.dump(known, file, indent=1)
        os.replace(path, FINDINGS)
