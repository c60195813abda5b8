"""Launching a Triton kernel: the first time through its JIT, then straight."""

from __future__ import annotations

from typing import Any

from ringflex.kernels.contract import Tile


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    tile: Tile,
    compiled: dict[Any, Any],
    key: Any,
) -> None:
    """Runs `kernel(*arguments, *constants)` on the current device and stream.

    Args:
        compiled: where kernels are kept, by `key`, which must distinguish all that Triton
            specialises on. Triton finds that out itself, but in a third of a small launch's time.
    """
    key = (kernel, key, constants, tile)
    ready = compiled.get(key)
    if ready is None:
        compiled[key] = kernel[grid](*arguments, *constants, num_warps=tile.num_warps) or False
    elif ready is False:  # the interpreter compiles nothing
        kernel[grid](*arguments, *constants, num_warps=tile.num_warps)
    else:
        ready[grid](*arguments, *constants)
