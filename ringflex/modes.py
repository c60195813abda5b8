"""Keeping torch's modes out: autocast, as masks, mods and kernels choose their dtypes themselves;
inference mode, as what is kept with a mask, a mod or a plan is for training, too; and compilation,
as kernels are compiled already, and what chooses them cannot be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def without_autocast(*device_types: str) -> AbstractContextManager[Any]:
    """Autocast off for these device types, by default the CPU and CUDA; free where it is off."""
    kinds = [d for d in device_types or ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    if not kinds:
        return nullcontext()
    stack = ExitStack()
    for kind in kinds:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def outside_inference_mode(fn: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function; in inference mode, whose tensors no backward could use later, without gradients
    in its place."""

    @functools.wraps(fn)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not torch.is_inference_mode_enabled():
            return fn(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return fn(*args, **kwargs)

    return call


def outside_compiled_code(fn: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function, which Dynamo calls as it is, by a graph break. `torch.compiler.disable` at once
    would do the same, and import Dynamo with the library, which takes seconds."""

    @functools.wraps(fn)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            result: _Result = torch.compiler.disable(fn)(*args, **kwargs)
            return result
        return fn(*args, **kwargs)

    return call
