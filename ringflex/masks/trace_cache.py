"""Tracing a mod once, although it is given at every call, or a mask anew with every batch.

A mod is known again by what its trace can depend on: its code, and what its closure, defaults and
globals hold, through the functions, modules and classes among them. Of modules and classes those
attributes count that any of the code reached names: a helper may be handed them. Numbers and the
like count by value, tensors by their shape, strides, dtype and device: a new tensor of the same
kind is bound to the old graph. What cannot be compared so (an object, a list) has a mod traced at
every call.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ringflex.masks.mods import MaskMod
from ringflex.masks.trace import trace_mask, trace_score
from ringflex.masks.traced_mod import TracedMod

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_STABLE = {"torch", "math", "operator", "_operator", "builtins"}  # packages that stay as they are
_KEPT = 128  # graphs
_MOST = 1000  # things that a mod may consist of
_DEEPEST = 32
_traces: OrderedDict[Any, tuple[TracedMod, tuple[int | Tensor, ...]]] = OrderedDict()
_lock = Lock()


class _Unknown(Exception):
    """Something that may change without a sign."""


def traced_score(score_mod: Callable[..., Tensor], dtype: torch.dtype) -> TracedMod:
    """`trace_score`, from memory if the mod was traced before."""
    return _traced(score_mod, dtype, lambda: trace_score(score_mod, dtype))


def traced_mask(mask_mod: Callable[..., Tensor]) -> TracedMod:
    """`trace_mask`, from memory if the mod was traced before."""
    return _traced(mask_mod, "mask", lambda: trace_mask(mask_mod))


def identity_of(fn: Callable[..., Tensor]) -> tuple[Any, list[Tensor]] | None:
    """What a mod is known again by, hashable, and the tensors that it holds, whose values do not
    count; None if it cannot be known again."""
    names: tuple[str, ...] = ()
    while True:  # what the names lead to may name more
        marks = _Marks(names)
        try:
            key = marks.of(fn)
        except _Unknown:
            return None
        if not marks.asked or marks.seen <= set(names):
            return (torch.get_default_dtype(), key), marks.tensors
        names = tuple(sorted(marks.seen.union(names)))


def _traced(fn: Callable[..., Tensor], kind: Any, trace: Callable[[], TracedMod]) -> TracedMod:
    identity = identity_of(fn)
    if identity is None:
        return trace()
    key, tensors = (kind, identity[0]), identity[1]
    with _lock:
        known = _traces.get(key)
        if known is not None:
            _traces.move_to_end(key)
    if known is None:
        mod = trace()
        _remember(key, mod, tensors)
        return mod
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
    with _lock:
        _traces[key] = (replace(mod, captures=()), tuple(places))
        if len(_traces) > _KEPT:
            _traces.popitem(last=False)


class _Marks:
    """What things are for a trace, hashable; collects the tensors among them.

    Args:
        names: attributes that code may ask for.

    Attributes:
        seen: those that the code met so far may ask for. asked: of something.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.seen, self.asked = names, set[str](), False
        self.tensors: list[Tensor] = []
        self.places: dict[int, int] = {}  # of what was met before, by identity
        self.left = _MOST

    def of(self, x: Any, depth: int = 0) -> Any:
        if isinstance(x, _VALUES):
            if isinstance(x, str) and x.isidentifier():
                self.seen.add(x)  # for `getattr`
            return (type(x), repr(x) if isinstance(x, float) else x)
        if type(x) in (Tensor, torch.nn.Parameter):
            same = next((i for i, t in enumerate(self.tensors) if t is x), len(self.tensors))
            if same == len(self.tensors):
                self.tensors.append(x)
            return (same, x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
        self.left -= 1
        if depth > _DEEPEST or self.left < 0:
            raise _Unknown
        if type(x) is tuple:
            return tuple(self.of(item, depth + 1) for item in x)
        if isinstance(x, functools.partial):
            keywords = tuple(sorted(x.keywords.items()))
            return tuple(self.of(item, depth + 1) for item in (x.func, x.args, keywords))
        if _is_stable(x):
            return x
        if id(x) in self.places:
            return (_Marks, self.places[id(x)])
        self.places[id(x)] = len(self.places)
        if isinstance(x, types.FunctionType):
            return self._of_function(x, depth)
        if type(x) is MaskMod:
            return (MaskMod, x.name, self.of(x.fn, depth + 1))
        if isinstance(x, types.ModuleType) or type(x) is type:
            self.asked = True
            return (x, *(self.of(v, depth + 1) for v in _attributes(x, self.names)))
        raise _Unknown

    def _of_function(self, fn: types.FunctionType, depth: int) -> Any:
        names = _names_in(fn.__code__)
        self.seen.update(names)
        try:
            held = [cell.cell_contents for cell in fn.__closure__ or ()]
        except ValueError:  # not assigned yet
            raise _Unknown from None
        scope = fn.__globals__
        globals_used = [scope[name] for name in names if name in scope]
        more = [tuple(sorted((d or {}).items())) for d in (fn.__kwdefaults__, fn.__dict__)]
        marks: list[Any] = [fn.__code__]
        for item in (*held, *(fn.__defaults__ or ()), *more, *globals_used):
            marks.append(self.of(item, depth + 1))
        return tuple(marks)


def _is_stable(x: Any) -> bool:
    """Whether `x` is of torch or Python itself, and always does the same."""
    if isinstance(x, types.ModuleType):
        home = x.__name__
    elif isinstance(x, (types.MethodDescriptorType, types.WrapperDescriptorType)):
        home = x.__objclass__.__module__
    elif isinstance(x, types.BuiltinFunctionType):
        owner = getattr(x, "__self__", None)
        of_an_object = not (owner is None or isinstance(owner, (types.ModuleType, type)))
        home = "" if of_an_object else x.__module__
    elif isinstance(x, type) or (isinstance(x, types.FunctionType) and not x.__closure__):
        home = x.__module__
    else:
        home = ""
    return str(home).partition(".")[0] in _STABLE


def _attributes(x: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """What a module or class answers to these names."""
    spaces = [vars(c) for c in x.__mro__] if isinstance(x, type) else [vars(x)]
    for name in names:
        found = next((space[name] for space in spaces if name in space), None)
        if found is None and isinstance(x, types.ModuleType) and "__getattr__" in vars(x):
            raise _Unknown
        yield found.__func__ if isinstance(found, (staticmethod, classmethod)) else found


@functools.lru_cache(maxsize=1024)
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            names.append(constant)
    return tuple(dict.fromkeys(names))
