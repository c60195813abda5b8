"""Keeping autocast out: masks, mods and kernels choose their dtypes themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch


def without_autocast(*device_types: str) -> AbstractContextManager[Any]:
    """Autocast off for these device types, by default the CPU and CUDA; free where it is off."""
    kinds = [d for d in device_types or ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    if not kinds:
        return nullcontext()
    stack = ExitStack()
    for kind in kinds:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
