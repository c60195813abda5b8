"""Launching Triton kernels: the first time through the JIT, then straight."""

from __future__ import annotations

from typing import Any

from triton import knobs
from triton.runtime import driver

from ringflex.kernels.contract import Tile
from ringflex.kernels.device_arrays import ready_for_current_stream

_ENTER, _EXIT = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook


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
        self._compiled: Any = None  # triton.compiler.CompiledKernel
        self._streams: set[int] = set()  # for which the fixed arguments are ready

    def __call__(self, *varying: Any) -> None:
        compiled = self._compiled
        if compiled is None:  # stays None in the interpreter, which compiles nothing
            self._make_ready()
            launch = self._kernel[self._grid]
            self._compiled = launch(*varying, *self._rest, num_warps=self.tile.num_warps)
        elif _ENTER.calls or _EXIT.calls:  # a profiler wants to hear of it
            self._make_ready()
            compiled[self._grid](*varying, *self._rest)
        else:
            active = driver.active
            stream = active.get_current_stream(active.get_current_device())
            if stream not in self._streams:
                self._make_ready()
            compiled.run(
                *self._grid, stream, compiled.function, compiled.packed_metadata,
                None, None, None, *varying, *self._rest,
            )  # fmt: skip

    def _make_ready(self) -> None:
        """What was copied to the device for it, maybe on another stream, is there."""
        stream = ready_for_current_stream(self._rest)
        if stream is not None:
            self._streams.add(stream)
