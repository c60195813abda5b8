"""Which implementation serves these inputs, and why."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from ringflex.kernels import eager

BACKENDS: dict[str, ModuleType] = {"eager": eager}


class Selection(NamedTuple):
    """A kernel (a module with `forward` and `backward`) and the reason for its choice."""

    kernel: ModuleType
    name: str
    reason: str


def select(backend: str) -> Selection:
    """The kernel for `backend`: a name, or "auto".

    Raises:
        ValueError: unknown name.
    """
    if backend == "auto":
        return Selection(eager, "eager", "the only implementation")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of auto, {', '.join(BACKENDS)}")
    return Selection(BACKENDS[backend], backend, "asked for")
