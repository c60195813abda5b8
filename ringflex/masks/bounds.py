"""A traced mask over whole rectangles of (q_idx, kv_idx), by interval arithmetic.

Every value of the graph becomes an interval that contains all the values it takes in the rectangle
(Moore, "Interval Analysis", 1966). A rectangle is *all* visible, *none* visible, or *undecided*.
Sound: an operation that is not in the table, or a result that could round, overflow or be NaN, is
widened until it is true; never is a rectangle called *all* or *none* that is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx

from ringflex.masks.intervals import (
    RULES,
    Interval,
    Undecidable,
    constant,
    converted,
    poisoned,
    settle,
    unknown,
)
from ringflex.masks.runs import Array
from ringflex.masks.traced_mod import TracedMod

NONE, ALL, UNDECIDED = 0, 1, 2

# Longer axes of a captured tensor are kept as ranges of so many: no more than a block, and few
# enough for 16 Mi tokens.
_GRANULES = ((4096, 1), (1 << 21, 32))
_COARSEST = 128


class Rectangles(NamedTuple):
    """`n` rectangles, bounds inclusive, all arrays int64 `[n]`."""

    b: Array
    h: Array
    q_lo: Array
    q_hi: Array
    kv_lo: Array
    kv_hi: Array


class MaskBounds:
    """Classifies rectangles of one mask; holds the range tables of its captured tensors.

    >>> bounds = MaskBounds(trace_mask(causal()))
    >>> codes = bounds.classify(rectangles)  # int8 [n]: NONE, ALL or UNDECIDED
    """

    def __init__(self, mask: TracedMod) -> None:
        cpu = mask.to(torch.device("cpu"))
        self.graph = cpu.module.graph
        self.varying = cpu.varying
        self.constants: dict[fx.Node, Any] = {}
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        arguments = len(placeholders) - len(cpu.captures)
        self.arguments = placeholders[:arguments]
        for node, capture in zip(placeholders[arguments:], cpu.captures, strict=True):
            self.constants[node] = capture.detach()
        for node in self.graph.nodes:
            if node.op == "call_function" and node not in self.varying:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.constants.__getitem__)
                self.constants[node] = node.target(*args, **kwargs)
        self.tables: dict[tuple[fx.Node, int], _RangeTable] = {}
        self.computes: dict[fx.Node, torch.dtype] = {}  # see _compute_dtype

    def classify(self, rectangles: Rectangles) -> Array:
        """int8 `[n]`: NONE, ALL or UNDECIDED for each rectangle."""
        r = rectangles
        axes = ((r.b, r.b), (r.h, r.h), (r.q_lo, r.q_hi), (r.kv_lo, r.kv_hi))
        values = {
            node: Interval(lo, hi) for node, (lo, hi) in zip(self.arguments, axes, strict=True)
        }
        with np.errstate(all="ignore"):
            for node in self.graph.nodes:
                if node in self.varying:
                    values[node] = self._interval(node, values)
                elif node.op == "output":
                    result = self._operand(node.args[0], values)
        lo, hi = np.broadcast_arrays(result.lo, result.hi, r.b)[:2]
        return np.where(lo, ALL, np.where(hi, UNDECIDED, NONE)).astype(np.int8)

    def _operand(
        self, arg: Any, values: dict[fx.Node, Interval], compute: torch.dtype | None = None
    ) -> Any:
        """An operand as an interval, as `compute` (the dtype the operation runs in) sees it."""
        if isinstance(arg, fx.Node):
            if arg in values:
                return converted(values[arg], compute)
            arg = self.constants[arg]
            if isinstance(arg, torch.Tensor) and arg.ndim == 0:
                arg = arg.item()
        return constant(arg, compute) if isinstance(arg, (bool, int, float)) else arg

    def _interval(self, node: fx.Node, values: dict[fx.Node, Interval]) -> Interval:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.ndim != 0:
            return unknown(torch.float64)
        dtype = value.dtype
        if node.target is torch.ops.aten.index.Tensor:
            return self._read(node, values, dtype)
        packet = getattr(node.target, "overloadpacket", node.target)
        rule = RULES.get(packet)
        if rule is None:
            return unknown(dtype)
        compute = self.computes.get(node)
        if compute is None:
            compute = self.computes[node] = _compute_dtype(node, dtype)
        try:
            args = [self._operand(arg, values, compute) for arg in node.args]
            kwargs = {k: self._operand(arg, values, compute) for k, arg in node.kwargs.items()}
            result = settle(rule(*args, **kwargs), dtype)
        except Undecidable:
            return unknown(dtype)
        if dtype == torch.bool or packet is torch.ops.aten.where:
            return result
        return poisoned(result, [x for x in args if isinstance(x, Interval)], dtype)

    def _read(self, node: fx.Node, values: dict[fx.Node, Interval], dtype: torch.dtype) -> Interval:
        source, keys = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(keys, (list, tuple))
        table = self.constants.get(source)
        if table is None or len(keys) != table.ndim or table.numel() == 0:
            return unknown(dtype)
        indices = [self._operand(key, values) for key in keys]
        if not all(isinstance(index, Interval) for index in indices):
            return unknown(dtype)
        wrapped = [_wrap(index, size) for index, size in zip(indices, table.shape, strict=True)]
        ranging = [d for d, index in enumerate(wrapped) if (index.lo != index.hi).any()]
        if len(ranging) > 1:  # a table over queries and keys at once: only its own range is known
            whole = self._range_table(source, -1)
            return whole.query([], constant(0))
        axis = ranging[0] if ranging else table.ndim - 1
        rows = [index.lo for d, index in enumerate(wrapped) if d != axis]
        return self._range_table(source, axis).query(rows, wrapped[axis])

    def _range_table(self, source: fx.Node, axis: int) -> _RangeTable:
        if (source, axis) not in self.tables:
            values = _to_numpy(self.constants[source])
            if axis == -1:
                values, axis_of = values.reshape(-1), 0
                self.tables[source, axis] = _RangeTable(
                    np.array([values.min(), values.max()]), axis_of, whole=True
                )
            else:
                self.tables[source, axis] = _RangeTable(values, axis)
        return self.tables[source, axis]


class _RangeTable:
    """Minimum and maximum of any range along one axis, for every position of the other axes.

    A sparse table (Bender and Farach-Colton, "The LCA problem revisited", 2000) over granules:
    a range is rounded outwards to whole granules, so its answer contains the true one.
    """

    def __init__(self, values: Array, axis: int, whole: bool = False) -> None:
        values = np.moveaxis(values, axis, -1)
        length = values.shape[-1]
        self.whole = whole
        self.granule = next((g for most, g in _GRANULES if length <= most), _COARSEST)
        count = -(-length // self.granule)
        self.lo, self.hi = ([x] for x in _extremes(values, self.granule))
        span = 1
        while 2 * span <= count:
            lo, hi = self.lo[-1], self.hi[-1]
            self.lo.append(np.minimum(lo[..., :-span], lo[..., span:]))
            self.hi.append(np.maximum(hi[..., :-span], hi[..., span:]))
            span *= 2

    def query(self, rows: list[Array], index: Interval) -> Interval:
        # Not what integers are only stored in: what is calculated with them would wrap around.
        stored = self.lo[0].dtype
        fits = stored.kind in "iu" and np.can_cast(stored, np.int64)
        kind = np.dtype(np.int64) if fits else stored
        if self.whole:
            ends = self.lo[-1].min(keepdims=True)[:1], self.hi[-1].max(keepdims=True)[:1]
            return Interval(*(end.astype(kind) for end in ends))
        first, last, *rows = np.broadcast_arrays(
            index.lo // self.granule, index.hi // self.granule, *rows
        )
        level = np.frexp((last - first + 1).astype(np.float64))[1] - 1
        lo, hi = np.empty(first.shape, kind), np.empty(first.shape, kind)
        for k in np.unique(level):
            at = level == k
            place = tuple(row[at] for row in rows)
            left, right = first[at], last[at] - (1 << int(k)) + 1
            lo[at] = np.minimum(self.lo[k][(*place, left)], self.lo[k][(*place, right)])
            hi[at] = np.maximum(self.hi[k][(*place, left)], self.hi[k][(*place, right)])
        return Interval(lo, hi)


def _extremes(values: Array, granule: int) -> tuple[Array, Array]:
    """Minimum and maximum of every `granule` values along the last axis; the last may be fewer."""
    if granule == 1:
        return values, values
    whole = values.shape[-1] // granule * granule
    main = values[..., :whole].reshape(*values.shape[:-1], -1, granule)
    if values.dtype in (np.uint16, np.uint32, np.uint64):  # which torch cannot reduce
        lo, hi = main.min(-1), main.max(-1)
    else:  # short rows take it half as long as numpy
        rows = torch.from_numpy(main)
        lo, hi = rows.amin(-1).numpy(), rows.amax(-1).numpy()
    if whole == values.shape[-1]:
        return lo, hi
    rest = values[..., whole:]
    return (
        np.concatenate([lo, rest.min(-1, keepdims=True)], -1),
        np.concatenate([hi, rest.max(-1, keepdims=True)], -1),
    )


def _to_numpy(tensor: torch.Tensor) -> Array:
    if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensor = tensor.double()
    elif not tensor.is_floating_point() and tensor.dtype != torch.bool:
        tensor = tensor.long() if tensor.numel() <= 4096 else tensor
    return tensor.numpy()


def _compute_dtype(node: fx.Node, result: torch.dtype) -> torch.dtype:
    """The dtype that an operation converts its operands to."""
    if result.is_floating_point:
        return result
    dtypes = [n.meta["val"].dtype for n in node.all_input_nodes]
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = torch.promote_types(common, dtype)
    if not common.is_floating_point and any(isinstance(arg, float) for arg in node.args):
        return torch.float32
    return common


def _wrap(index: Interval, size: int) -> Interval:
    """Python's negative indices; anything out of range becomes the whole axis."""
    negative = index.hi < 0
    lo = np.where(negative, index.lo + size, index.lo)
    hi = np.where(negative, index.hi + size, index.hi)
    outside = (lo < 0) | (hi >= size)
    return Interval(np.where(outside, 0, lo), np.where(outside, size - 1, hi))
