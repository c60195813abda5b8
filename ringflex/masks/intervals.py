"""Interval arithmetic over arrays: one rule per aten operation.

Intervals are closed and contain every value an operation can give for operands in theirs. What can
round is widened by 16 ulp of the traced dtype, what can overflow or be NaN becomes unbounded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from ringflex.masks.runs import Array


class Interval(NamedTuple):
    """`lo <= value <= hi`. Booleans: `lo` = certainly true, `hi` = possibly true."""

    lo: Array
    hi: Array


class Undecidable(Exception):
    """The rule has no bound for these operands."""


def constant(value: bool | int | float, compute: torch.dtype | None = None) -> Interval:
    """A Python number: as written, or as it becomes when converted to `compute`."""
    if compute is None or compute == torch.bool or isinstance(value, bool):
        array = np.array([value])
        return Interval(array, array)
    if compute.is_floating_point:
        converted = torch.tensor(float(value), dtype=compute, device="cpu").item()
        return Interval(np.array([min(value, converted)]), np.array([max(value, converted)]))
    info = torch.iinfo(compute)
    if not info.min <= value <= info.max:
        raise Undecidable  # the number wraps round
    return constant(value)


def converted(x: Interval, compute: torch.dtype | None) -> Interval:
    """An interval as `compute` sees it: large integers are rounded, or wrap round."""
    if compute in (None, torch.bool, torch.int64) or x.lo.dtype.kind not in "iu":
        return x
    assert compute is not None
    if not compute.is_floating_point:
        info = torch.iinfo(compute)
        if (x.lo < info.min).any() or (x.hi > info.max).any():
            raise Undecidable
        return x
    eps = torch.finfo(compute).eps
    lo, hi = x.lo.astype(np.float64), x.hi.astype(np.float64)
    if max(np.abs(lo).max(initial=0), np.abs(hi).max(initial=0)) * eps <= 1:
        return x
    return Interval(lo - np.abs(lo) * eps, hi + np.abs(hi) * eps)


def poisoned(result: Interval, operands: list[Interval], dtype: torch.dtype) -> Interval:
    """Where an operand is unbounded it may be infinite or NaN, and the result anything."""
    whole = unknown(dtype)
    for x in operands:
        if x.lo.dtype.kind == "f":
            bad = ~(np.isfinite(x.lo) & np.isfinite(x.hi))
            if bad.any():
                result = Interval(
                    np.where(bad, whole.lo, result.lo), np.where(bad, whole.hi, result.hi)
                )
    return result


def unknown(dtype: torch.dtype) -> Interval:
    if dtype == torch.bool:
        return Interval(np.array([False]), np.array([True]))
    if dtype.is_floating_point:
        return Interval(np.array([-math.inf]), np.array([math.inf]))
    info = torch.iinfo(dtype)
    return Interval(np.array([info.min]), np.array([info.max]))


def settle(x: Interval, dtype: torch.dtype) -> Interval:
    """Widens a result by what rounding and overflow in `dtype` can do to it."""
    if dtype == torch.bool:
        return Interval(x.lo.astype(bool), x.hi.astype(bool))
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        lo, hi = x.lo.astype(np.float64), x.hi.astype(np.float64)
        # 16 ulp covers the approximate functions of any backend, not only correct rounding.
        lo = lo - np.abs(lo) * (16 * info.eps) - info.tiny
        hi = hi + np.abs(hi) * (16 * info.eps) + info.tiny
        bad = np.isnan(lo) | np.isnan(hi)
        lo = np.where(bad | (lo < info.min), -math.inf, lo)
        hi = np.where(bad | (hi > info.max), math.inf, hi)
        return Interval(lo, hi)
    whole = unknown(dtype)
    # In float64 the comparison itself cannot overflow; 2**62 leaves room for its rounding.
    limit = min(-float(torch.iinfo(dtype).min), 2.0**62)
    if x.lo.dtype == np.int64 and _within(x, limit):
        return x
    outside = (x.lo < -limit) | (x.hi >= limit) | (x.lo >= limit) | (x.hi < -limit)
    if x.lo.dtype.kind == "f":
        outside |= np.isnan(x.lo) | np.isnan(x.hi)
        large = (np.abs(x.lo) > 2.0**52) | (np.abs(x.hi) > 2.0**52)
        x = Interval(
            np.where(large, np.nextafter(x.lo, -math.inf), x.lo),
            np.where(large, np.nextafter(x.hi, math.inf), x.hi),
        )
    lo = np.where(outside, whole.lo, np.where(outside, 0, x.lo).astype(np.int64))
    hi = np.where(outside, whole.hi, np.where(outside, 0, x.hi).astype(np.int64))
    return Interval(lo, hi)


def _within(x: Interval, limit: float) -> bool:
    """Whether all integers are less than `limit` in size."""
    return bool(x.lo.size) and -limit < x.lo.min() and bool(x.hi.max() < limit)


def _number(x: Interval) -> Interval:
    """int64 or float64, so that numpy's arithmetic is exact or rounded once."""
    if x.lo.dtype.kind == "f":
        return x
    if x.lo.dtype == np.int64 and _within(x, 2.0**31):
        return x
    if max(np.abs(x.lo.astype(np.float64)).max(), np.abs(x.hi.astype(np.float64)).max()) > 2.0**31:
        # Products and sums of larger integers may overflow int64: go on in outward-rounded float64.
        lo, hi = x.lo.astype(np.float64), x.hi.astype(np.float64)
        return Interval(np.nextafter(lo, -math.inf), np.nextafter(hi, math.inf))
    return Interval(x.lo.astype(np.int64), x.hi.astype(np.int64))


def _corners(f: Callable[[Array, Array], Array], x: Interval, y: Interval) -> Interval:
    values = [f(a, b) for a in x for b in y]
    return Interval(
        np.minimum.reduce(np.broadcast_arrays(*values)),
        np.maximum.reduce(np.broadcast_arrays(*values)),
    )


def _add(x: Interval, y: Interval, *, alpha: Interval | None = None) -> Interval:
    x, y = _number(x), _number(y if alpha is None else _multiply(y, alpha))
    return Interval(x.lo + y.lo, x.hi + y.hi)


def _negative(x: Interval) -> Interval:
    x = _number(x)
    return Interval(-x.hi, -x.lo)


def _subtract(x: Interval, y: Interval, *, alpha: Interval | None = None) -> Interval:
    return _add(x, _negative(y if alpha is None else _multiply(y, alpha)))


def _multiply(x: Interval, y: Interval) -> Interval:
    return _corners(operator.mul, _number(x), _number(y))


def _excludes_zero(y: Interval) -> None:
    if not ((y.lo > 0) | (y.hi < 0)).all():
        raise Undecidable


def _divide(x: Interval, y: Interval, *, rounding_mode: str | None = None) -> Interval:
    if rounding_mode == "floor":
        return _floor_divide(x, y)
    _excludes_zero(y)
    x, y = _number(x), _number(y)
    if rounding_mode == "trunc":
        if x.lo.dtype.kind == "f" or y.lo.dtype.kind == "f":
            raise Undecidable
        return _corners(lambda a, b: np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)), x, y)
    return _corners(np.true_divide, x, y)


def _floor_divide(x: Interval, y: Interval) -> Interval:
    _excludes_zero(y)
    x, y = _number(x), _number(y)
    result = _corners(np.floor_divide, x, y)
    if result.lo.dtype.kind == "f":  # a float quotient near an integer may fall either way
        return Interval(result.lo - 1, result.hi + 1)
    return result


def _remainder(x: Interval, y: Interval) -> Interval:
    if not (y.lo > 0).all():
        raise Undecidable
    x, y = _number(x), _number(y)
    if x.lo.dtype.kind == "f" or y.lo.dtype.kind == "f":
        return Interval(np.zeros_like(y.hi), y.hi)
    same = (y.lo == y.hi) & (x.lo // y.lo == x.hi // y.lo)
    return Interval(np.where(same, x.lo % y.lo, 0), np.where(same, x.hi % y.lo, y.hi - 1))


def _comparison(
    certain: Callable[[Interval, Interval], Array], possible: Callable[[Interval, Interval], Array]
) -> Callable[[Interval, Interval], Interval]:
    def rule(x: Interval, y: Interval) -> Interval:
        lo, hi = certain(x, y), possible(x, y)
        if x.lo.dtype.kind != "f" and y.lo.dtype.kind != "f":
            return Interval(lo, hi)
        finite = np.isfinite(x.lo) & np.isfinite(x.hi) & np.isfinite(y.lo) & np.isfinite(y.hi)
        return Interval(lo & finite, hi | ~finite)  # an unbounded value may be NaN

    return rule


def _not(x: Interval) -> Interval:
    if x.lo.dtype.kind != "b":
        return _subtract(Interval(np.array([-1]), np.array([-1])), x)
    return Interval(~x.hi, ~x.lo)


def _truth(x: Interval) -> Interval:
    if x.lo.dtype.kind == "b":
        return x
    return Interval((x.lo > 0) | (x.hi < 0), (x.lo != 0) | (x.hi != 0))


def _and(x: Interval, y: Interval) -> Interval:
    if x.lo.dtype.kind == "b" and y.lo.dtype.kind == "b":
        return Interval(x.lo & y.lo, x.hi & y.hi)
    return _bits(np.bitwise_and, x, y)


def _or(x: Interval, y: Interval) -> Interval:
    if x.lo.dtype.kind == "b" and y.lo.dtype.kind == "b":
        return Interval(x.lo | y.lo, x.hi | y.hi)
    return _bits(np.bitwise_or, x, y)


def _xor(x: Interval, y: Interval) -> Interval:
    if x.lo.dtype.kind == "b" and y.lo.dtype.kind == "b":
        known = (x.lo == x.hi) & (y.lo == y.hi)
        return Interval(known & (x.lo ^ y.lo), ~known | (x.lo ^ y.lo))
    return _bits(np.bitwise_xor, x, y)


def _bits(f: Any, x: Interval, y: Interval) -> Interval:
    x, y = (Interval(v.lo.astype(np.int64), v.hi.astype(np.int64)) for v in (x, y))
    if (x.lo == x.hi).all() and (y.lo == y.hi).all():
        return Interval(f(x.lo, y.lo), f(x.lo, y.lo))
    if f is np.bitwise_and and ((x.lo >= 0) & (y.lo >= 0)).all():
        return Interval(np.zeros_like(x.lo), np.minimum(x.hi, y.hi))
    raise Undecidable


def _shift_right(x: Interval, y: Interval) -> Interval:
    if not (y.lo >= 0).all() or (y.hi > 62).any():
        raise Undecidable
    return _corners(np.right_shift, Interval(*(v.astype(np.int64) for v in x)), y)


def _shift_left(x: Interval, y: Interval) -> Interval:
    if not (y.lo >= 0).all() or (y.hi > 30).any():
        raise Undecidable
    return _multiply(x, Interval(np.int64(1) << y.lo, np.int64(1) << y.hi))


def _where(condition: Interval, x: Interval, y: Interval) -> Interval:
    c = _truth(condition)
    if x.lo.dtype.kind != "b" or y.lo.dtype.kind != "b":
        x, y = _number(x), _number(y)
    lo = np.where(c.lo, x.lo, np.where(c.hi, np.minimum(x.lo, y.lo), y.lo))
    hi = np.where(c.lo, x.hi, np.where(c.hi, np.maximum(x.hi, y.hi), y.hi))
    return Interval(lo, hi)


def _minimum(x: Interval, y: Interval) -> Interval:
    return Interval(np.minimum(x.lo, y.lo), np.minimum(x.hi, y.hi))


def _maximum(x: Interval, y: Interval) -> Interval:
    return Interval(np.maximum(x.lo, y.lo), np.maximum(x.hi, y.hi))


def _clamp(x: Interval, min: Interval | None = None, max: Interval | None = None) -> Interval:
    x = x if min is None else _maximum(x, min)
    return x if max is None else _minimum(x, max)


def _absolute(x: Interval) -> Interval:
    x = _number(x)
    spans = (x.lo < 0) & (x.hi > 0)
    low, high = np.abs(x.lo), np.abs(x.hi)
    return Interval(np.where(spans, 0, np.minimum(low, high)), np.maximum(low, high))


def _power(x: Interval, exponent: Interval) -> Interval:
    n = exponent.lo
    if n.size != 1 or exponent.hi.item() != n.item() or n.item() not in (1, 2, 3):
        raise Undecidable
    result = _multiply(x, x) if n.item() != 1 else x
    if n.item() == 2:
        return _multiply(_absolute(x), _absolute(x))
    return _multiply(result, x) if n.item() == 3 else result


def _increasing(f: Callable[[Array], Array], low: float = -math.inf) -> Callable[..., Interval]:
    """A function that never falls, defined for `x >= low`."""

    def rule(x: Interval) -> Interval:
        if (x.lo < low).any():
            raise Undecidable
        return Interval(f(x.lo.astype(np.float64)), f(x.hi.astype(np.float64)))

    return rule


def _rounding(f: Callable[[Array], Array]) -> Callable[..., Interval]:
    def rule(x: Interval, **options: Any) -> Interval:
        if options:  # decimals=
            raise Undecidable
        return Interval(f(x.lo), f(x.hi)) if x.lo.dtype.kind == "f" else x

    return rule


def _cast(x: Interval, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Interval:
    if dtype == torch.bool:
        return _truth(x)
    if dtype is not None and not dtype.is_floating_point and x.lo.dtype.kind == "f":
        return Interval(np.trunc(x.lo), np.trunc(x.hi))
    return Interval(x.lo * 1, x.hi * 1)


def _sign(x: Interval) -> Interval:
    x = _number(x)
    return Interval(np.sign(x.lo), np.sign(x.hi))


def _unit(_: Interval) -> Interval:
    return Interval(np.array([-1.0]), np.array([1.0]))


_aten = torch.ops.aten
RULES: dict[Any, Callable[..., Interval]] = {
    _aten.add: _add,
    _aten.sub: _subtract,
    _aten.rsub: lambda x, y, **kw: _subtract(y, x, **kw),
    _aten.neg: _negative,
    _aten.mul: _multiply,
    _aten.div: _divide,
    _aten.floor_divide: _floor_divide,
    _aten.remainder: _remainder,
    _aten.lt: _comparison(lambda x, y: x.hi < y.lo, lambda x, y: x.lo < y.hi),
    _aten.le: _comparison(lambda x, y: x.hi <= y.lo, lambda x, y: x.lo <= y.hi),
    _aten.gt: _comparison(lambda x, y: x.lo > y.hi, lambda x, y: x.hi > y.lo),
    _aten.ge: _comparison(lambda x, y: x.lo >= y.hi, lambda x, y: x.hi >= y.lo),
    _aten.eq: _comparison(
        lambda x, y: (x.lo == y.hi) & (x.hi == y.lo), lambda x, y: (x.lo <= y.hi) & (x.hi >= y.lo)
    ),
    _aten.ne: _comparison(
        lambda x, y: (x.lo > y.hi) | (x.hi < y.lo), lambda x, y: ~((x.lo == y.hi) & (x.hi == y.lo))
    ),
    _aten.bitwise_and: _and,
    _aten.bitwise_or: _or,
    _aten.bitwise_xor: _xor,
    _aten.bitwise_not: _not,
    _aten.bitwise_right_shift: _shift_right,
    _aten.bitwise_left_shift: _shift_left,
    _aten.__rshift__: _shift_right,
    _aten.__lshift__: _shift_left,
    _aten.logical_and: lambda x, y: _and(_truth(x), _truth(y)),
    _aten.logical_or: lambda x, y: _or(_truth(x), _truth(y)),
    _aten.logical_xor: lambda x, y: _xor(_truth(x), _truth(y)),
    _aten.logical_not: lambda x: _not(_truth(x)),
    _aten.where: _where,
    _aten.minimum: _minimum,
    _aten.maximum: _maximum,
    _aten.clamp: _clamp,
    _aten.clamp_min: lambda x, low: _maximum(x, low),
    _aten.clamp_max: lambda x, high: _minimum(x, high),
    _aten.relu: lambda x: _maximum(x, constant(0)),
    _aten.abs: _absolute,
    _aten.pow: _power,
    _aten.exp: _increasing(np.exp),
    _aten.exp2: _increasing(np.exp2),
    _aten.log: _increasing(np.log, 0.0),
    _aten.log2: _increasing(np.log2, 0.0),
    _aten.sqrt: _increasing(np.sqrt, 0.0),
    _aten.tanh: _increasing(np.tanh),
    _aten.sigmoid: _increasing(lambda x: 1 / (1 + np.exp(-x))),
    _aten.sin: _unit,
    _aten.cos: _unit,
    _aten.floor: _rounding(np.floor),
    _aten.ceil: _rounding(np.ceil),
    _aten.round: _rounding(np.rint),
    _aten.trunc: _rounding(np.trunc),
    _aten.sign: _sign,
    _aten._to_copy: _cast,
    _aten.clone: lambda x, **_: x,
    _aten.alias: lambda x: x,
    _aten.detach: lambda x: x,
    _aten.lift_fresh_copy: lambda x: x,
}
