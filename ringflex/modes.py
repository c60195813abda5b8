"""Keeping torch's modes out: autocast, as masks, mods and kernels choose their dtypes themselves,
and inference mode, as what is kept with a mask, a mod or a plan is for training, too."""

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


def without_inference_mode() -> AbstractContextManager[Any]:
    """No gradients in place of inference mode, whose tensors no backward could use later."""
    if not torch.is_inference_mode_enabled():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack
