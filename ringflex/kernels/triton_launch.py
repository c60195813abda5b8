"""Launching Triton kernels: the first time through the JIT, then straight."""

from __future__ import annotations

from typing import Any

from ringflex.kernels.contract import Tile


class Prepared:
    """A kernel with all arguments but the first ones, which change from call to call.

    Calling it with those launches it on the current device and stream. Triton's JIT works out anew
    at every launch what a kernel was compiled for, which takes longer than a small launch; so a
    prepared kernel must only be called with arguments that it specialises on alike: the same
    dtypes, strides and alignment.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        fixed: tuple[Any, ...],
        constants: tuple[Any, ...],
        tile: Tile,
    ) -> None:
        self.tile = tile
        self._kernel, self._grid, self._rest = kernel, grid, (*fixed, *constants)
        self._compiled: Any = None

    def __call__(self, *varying: Any) -> None:
        if self._compiled is not None:
            self._compiled(*varying, *self._rest)
            return
        launched = self._kernel[self._grid](*varying, *self._rest, num_warps=self.tile.num_warps)
        if launched is not None:  # the interpreter compiles nothing
            self._compiled = launched[self._grid]
