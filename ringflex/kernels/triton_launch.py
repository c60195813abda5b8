"""Launching a Triton kernel."""

from __future__ import annotations

from typing import Any

from ringflex.kernels.contract import Tile


def launch(
    kernel: Any,
    grid: int | tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    tile: Tile,
) -> None:
    """Runs `kernel(*arguments, *constants)` on the current device and stream."""
    grid = grid if isinstance(grid, tuple) else (grid,)
    kernel[grid](*arguments, *constants, num_warps=tile.num_warps)
