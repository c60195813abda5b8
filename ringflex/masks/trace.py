"""From a mod, a Python function, to its aten graph: a `TracedMod`.

`make_fx` records the aten operations on the 0-dim tensors that a mod is given as indices.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ringflex.masks.graph_rewrites import (
    dependence,
    drop_reshapes,
    free_constants,
    lift_captures,
    make_functional,
    merge_nested_reads,
    replace_approximations,
    tracing,
)
from ringflex.masks.traced_mod import INDEX, INDEX_NAMES, Line, TracedMod, place_of
from ringflex.modes import without_autocast

_LEAVING = (
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__, Tensor.__int__,
    Tensor.__float__, Tensor.__index__, Tensor.__contains__,
)  # fmt: skip


class IndexByTensor(TorchFunctionMode):
    """Records `table[q_idx, kv_idx]` as an aten index; plain indexing would ask for `.item()`.

    Refuses what would leave the trace unseen: values taken out of tensors, which would become
    numbers of the graph, and tensor subclasses, whose operations may mean something else.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for subclass in types:
            if subclass not in (Tensor, torch.nn.Parameter, FakeTensor):
                raise TypeError(
                    f"a captured tensor must be a plain torch.Tensor, got {subclass.__name__} "
                    f"(of a DTensor, capture `.full_tensor()` or `.to_local()`)"
                )
        if func in _LEAVING:
            raise RuntimeError(f"{func.__name__} takes a value out of a tracing tensor")
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        table, key = args
        key = key if isinstance(key, tuple) else (key,)
        indices: list[Tensor | None] = []
        dim = 0
        for item in key:
            if isinstance(item, int) and not isinstance(item, bool):
                table = table.select(dim, item)
                continue
            if isinstance(item, Tensor) and item.dtype == torch.uint8:
                raise TypeError("an index of uint8 means a mask to torch; write `table[i.long()]`")
            if isinstance(item, Tensor) and item.dtype != torch.bool:
                indices.append(item)
            elif item == slice(None):
                indices.append(None)
            else:
                return func(*args, **(kwargs or {}))
            dim += 1
        if all(index is None for index in indices):
            return table
        return INDEX(table, indices)


def trace_mask(mask_mod: Callable[..., Tensor]) -> TracedMod:
    """Traces `mask_mod(b, h, q_idx, kv_idx) -> bool`.

    Raises:
        TypeError: not a function of four indices, or it does not return a boolean scalar tensor.
        ValueError: it branches on the value of a tensor, or draws random numbers.
    """
    example = [torch.zeros((), dtype=torch.int64, device="cpu") for _ in INDEX_NAMES]
    return _trace(mask_mod, "mask_mod", INDEX_NAMES, example, (torch.bool,))


def trace_score(score_mod: Callable[..., Tensor], dtype: torch.dtype) -> TracedMod:
    """Traces `score_mod(score, b, h, q_idx, kv_idx) -> score` for scores of `dtype`.

    Raises:
        TypeError: not a function of a score and four indices, or it does not return a
            floating-point scalar tensor.
        ValueError: it branches on the value of a tensor, or draws random numbers.
    """
    example = [torch.zeros((), dtype=dtype, device="cpu")]
    example += [torch.zeros((), dtype=torch.int64, device="cpu") for _ in INDEX_NAMES]
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return _trace(score_mod, "score_mod", ("score", *INDEX_NAMES), example, floats)


@tracing()
def _trace(
    fn: Callable[..., Tensor],
    kind: str,
    names: tuple[str, ...],
    example: list[Tensor],
    dtypes: tuple[torch.dtype, ...],
) -> TracedMod:
    name = str(getattr(fn, "name", None) or getattr(fn, "__name__", type(fn).__name__))
    _check_callable(fn, kind, names, name)

    def positional(*args: Tensor) -> Tensor:
        result = fn(*args)
        _check_result(result, kind, name, dtypes)
        return result

    watch = _Watch(positional.__code__, f"{kind} '{name}'")
    try:
        with IndexByTensor(), torch.no_grad(), without_autocast(), watch:
            module = make_fx(positional)(*example)
    except RuntimeError as error:
        if "out of a tracing tensor" not in str(error) and "item()" not in str(error):
            raise
        raise ValueError(_branch_message(fn, kind, name, error)) from error
    approximate = replace_approximations(module)
    free_constants(module)
    make_functional(module, kind, name)
    drop_reshapes(module)
    merge_nested_reads(module)
    captures = lift_captures(module)
    uses, varying, scalar = dependence(module.graph, names)
    lines = tuple(watch.lines)
    return TracedMod(name, module, captures, uses, varying, scalar, approximate, lines)


class _Watch(TorchDispatchMode):
    """Notes each aten operation and the user's line that it comes from; refuses random numbers, and
    values taken out of tensors by an operation's arguments, as in `torch.full((), captured)`."""

    def __init__(self, outermost: CodeType, what: str) -> None:
        super().__init__()
        self.outermost, self.what, self.lines = outermost, what, list[Line]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("an argument takes a value out of a tracing tensor")
        line = (func, *self._users_line(sys._getframe(1)))
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ValueError(
                f"{self.what} draws random numbers by {func}{place_of(line)}: it is evaluated more "
                "than once, in blocks and in the backward; capture a tensor of random numbers"
            )
        self.lines.append(line)
        return func(*args, **(kwargs or {}))

    def _users_line(self, frame: FrameType | None) -> tuple[str, int]:
        while frame is not None and frame.f_code is not self.outermost:
            filename = frame.f_code.co_filename
            if filename != __file__ and "/torch/" not in filename:
                return filename, frame.f_lineno
            frame = frame.f_back
        return "", 0


def _check_callable(fn: Any, kind: str, names: tuple[str, ...], name: str) -> None:
    wanted = f"{kind}({', '.join(names)})"
    if not callable(fn):
        raise TypeError(f"{kind} must be a function {wanted}, got {type(fn).__name__}: {fn!r:.80}")
    try:
        inspect.signature(fn).bind(*names)
    except TypeError as error:
        raise TypeError(
            f"{kind} '{name}' must be callable as {wanted}; its signature is "
            f"{name}{inspect.signature(fn)}: {error}"
        ) from None
    except ValueError:  # builtins have no signature; calling them will tell
        return


def _check_result(result: Any, kind: str, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if kind == "mask_mod":
        wanted = "a boolean tensor, e.g. `return (q_idx >= kv_idx) & (q_idx - kv_idx < 128)`"
    else:
        wanted = "the score as a floating-point tensor, e.g. `return score + bias[h]`"
    if not isinstance(result, Tensor):
        raise TypeError(
            f"{kind} '{name}' must return {wanted}; got {type(result).__name__} {result!r:.60}"
        )
    if result.dtype not in dtypes:
        raise TypeError(f"{kind} '{name}' must return {wanted}; got dtype {result.dtype}")
    if result.ndim != 0:
        raise TypeError(
            f"{kind} '{name}' is called for one element and must return one value; "
            f"got shape {tuple(result.shape)}"
        )


def _branch_message(fn: Any, kind: str, name: str, error: BaseException) -> str:
    where = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        in_library = "/torch/" in frame.filename or frame.filename == __file__
        if not in_library:
            where = f" ({frame.filename}:{frame.lineno}: {frame.line})"
            break
    return (
        f"{kind} '{name}' turns a tensor into a Python value{where}: `if`, `and`, `or`, `not`, "
        f"`int()`, `.item()`, numpy and chained comparisons cannot be traced. Write it with "
        f"tensors: `a & b` for `a and b`, `a | b` for `a or b`, `~a` for `not a`, "
        f"`(low <= x) & (x < high)` for `low <= x < high`, and `torch.where(condition, x, y)` "
        f"for `x if condition else y`."
    )
