"""Tracing a score mod once, although it is given at every call.

A mod is known again by what its trace can depend on: its code, and what its closure, defaults and
globals hold, through the functions among them. Numbers and the like count by value, tensors by
their shape, strides, dtype and device: a new tensor of the same kind is bound to the old graph.
What cannot be compared so (a bound method's object, a list) has a mod traced at every call.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ringflex.masks.trace import TracedMod, trace_score

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_NAMES = (types.ModuleType, type, types.BuiltinFunctionType, types.MethodDescriptorType)
_KEPT = 128  # graphs
_traces: OrderedDict[Any, tuple[TracedMod, tuple[int | Tensor, ...]]] = OrderedDict()


class _Unknown(Exception):
    """Something that may change without a sign."""


def traced_score(score_mod: Callable[..., Tensor], dtype: torch.dtype) -> TracedMod:
    """`trace_score`, from memory if the mod was traced before."""
    tensors: list[Tensor] = []
    try:
        key = (dtype, torch.get_default_dtype(), _mark(score_mod, tensors))
        known = _traces.get(key)
    except _Unknown:
        return trace_score(score_mod, dtype)
    if known is None:
        mod = trace_score(score_mod, dtype)
        _remember(key, mod, tensors)
        return mod
    _traces.move_to_end(key)
    template, places = known
    if not places:
        return template
    captures = tuple(p if isinstance(p, Tensor) else tensors[p] for p in places)
    return replace(template, captures=captures)


def _remember(key: Any, mod: TracedMod, tensors: list[Tensor]) -> None:
    """Keeps the graph without the tensors of the closure, which others may want to free."""
    places: list[int | Tensor] = []
    for capture in mod.captures:
        found = next((i for i, t in enumerate(tensors) if t is capture), None)
        if found is None and capture.numel() > 64:
            return  # made by the mod itself
        places.append(capture if found is None else found)
    inputs = [n for n in mod.module.graph.nodes if n.op == "placeholder"]
    for node, capture in zip(inputs[len(inputs) - len(places) :], mod.captures, strict=True):
        node.meta["val"] = torch.empty_strided(
            capture.shape, capture.stride(), dtype=capture.dtype, device="meta"
        )
    _traces[key] = (replace(mod, captures=(), written=None), tuple(places))
    if len(_traces) > _KEPT:
        _traces.popitem(last=False)


def _mark(x: Any, tensors: list[Tensor], depth: int = 0) -> Any:
    """What `x` is for a trace, hashable; collects the tensors in it."""
    if isinstance(x, _VALUES):
        return (type(x), repr(x) if isinstance(x, float) else x)
    if type(x) in (Tensor, torch.nn.Parameter):
        same = next((i for i, t in enumerate(tensors) if t is x), len(tensors))
        if same == len(tensors):
            tensors.append(x)
        return (same, x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
    if isinstance(x, _NAMES):
        return x
    if depth > 8:
        raise _Unknown
    if type(x) is tuple:
        return tuple(_mark(item, tensors, depth + 1) for item in x)
    if isinstance(x, functools.partial):
        keywords = tuple(sorted(x.keywords.items()))
        return tuple(_mark(item, tensors, depth + 1) for item in (x.func, x.args, keywords))
    if isinstance(x, types.FunctionType):
        return _mark_function(x, tensors, depth)
    raise _Unknown


def _mark_function(fn: types.FunctionType, tensors: list[Tensor], depth: int) -> Any:
    marks: list[Any] = [fn.__code__]
    cells = fn.__closure__ or ()
    try:
        held = [cell.cell_contents for cell in cells]
    except ValueError:  # not assigned yet
        raise _Unknown from None
    keywords = tuple(sorted((fn.__kwdefaults__ or {}).items()))
    scope = fn.__globals__
    globals_used = [scope[name] for name in _names_in(fn.__code__) if name in scope]
    for item in (*held, *(fn.__defaults__ or ()), keywords, *globals_used):
        marks.append(None if item is fn else _mark(item, tensors, depth + 1))
    return tuple(marks)


@functools.lru_cache(maxsize=1024)
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names_in(constant)
    return tuple(dict.fromkeys(names))
