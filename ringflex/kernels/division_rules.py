"""Division and its kin as Triton source, with the signs and the rounding of torch.

A quotient of what depends on the score may be off by 2.4e-7, relative. One of indices and captured
tensors is correctly rounded: a mask may make an integer of it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch

from ringflex.kernels.scalars import (
    Emitter,
    Unsupported,
    Value,
    as_tensor,
    bounds_of,
    corners,
    exact_dtype,
    number,
    operands,
)

SETTLED = {"b", "h", "q_idx", "kv_idx"}  # inputs whose functions may become integers


def divide(
    e: Emitter, out: torch.dtype, x: Value, y: Value, *, rounding_mode: str | None = None
) -> Value:
    if rounding_mode == "floor":
        return floor_divide(e, out, x, y)
    x, y = operands(e, out, x, y)
    if rounding_mode == "trunc":
        if not out.is_floating_point:
            return _c_quotient(e, out, x, y)
        return e.settle(truncate(e, exact_dtype(out), _exact_quotient(e, x, y)), out)
    settled = x.depends | y.depends <= SETTLED
    factor = _reciprocal(y, exact=settled)
    if factor is not None and not x.is_number:
        return e.settle(e.let(f"{x.text} * {number(factor, exact_dtype(out)).text}", out, [x]), out)
    if settled:
        return e.settle(_exact_quotient(e, x, y), out)
    return e.settle(e.let(f"{as_tensor(e, x)} / {y.text}", out, [x, y]), out)


def _reciprocal(y: Value, *, exact: bool) -> float | None:
    """Of a number, if it can be multiplied by instead; `exact`: only if nothing is lost."""
    value = float(y.number or 0)
    if value == 0 or not math.isfinite(1 / value):
        return None
    return 1 / value if not exact or abs(math.frexp(value)[0]) == 0.5 else None


def _exact_quotient(e: Emitter, x: Value, y: Value) -> Value:
    """Correctly rounded."""
    if torch.float64 in (x.dtype, y.dtype):
        return e.let(f"{as_tensor(e, x)} / {as_tensor(e, y)}", torch.float64, [x, y])
    return e.let(f"tl.div_rn({as_tensor(e, x)}, {as_tensor(e, y)})", torch.float32, [x, y])


def _c_quotient(e: Emitter, out: torch.dtype, x: Value, y: Value) -> Value:
    """Of integers, towards zero."""
    toward_zero = lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return e.integer("{} // {}", out, [x, y], _quotient_bounds(toward_zero, x, y))


def _quotient_bounds(f: Callable[[int, int], int], x: Value, y: Value) -> tuple[int, int]:
    low, high = bounds_of(y)
    if low <= 0 <= high:
        size = max(map(abs, bounds_of(x)))
        return -size, size
    return corners(f, x, y)


def floor_divide(e: Emitter, out: torch.dtype, x: Value, y: Value) -> Value:
    x, y = e.cast(x, out), e.cast(y, out)
    if out.is_floating_point:
        return _float_division(e, out, "floor", x, y)[0]
    quotient = _c_quotient(e, out, x, y)
    if bounds_of(x)[0] >= 0 and bounds_of(y)[0] > 0:
        return quotient
    below = _wrong_sign(e, _c_remainder(e, out, x, y), y)
    bounds = _quotient_bounds(operator.floordiv, x, y)
    return e.integer("{} - {}.to(tl.int32)", out, [quotient, below], bounds)


def _float_division(
    e: Emitter, out: torch.dtype, rounding: str, x: Value, y: Value
) -> tuple[Value, Value]:
    """The whole quotient, rounded down ("floor") or to zero ("trunc"), and the remainder.

    In fp64, where both are exact for fp32 operands whose quotient is below 2^28, as torch's are.
    """
    if out == torch.float64:
        raise Unsupported("in fp64")
    double = torch.float64
    x, y = e.cast(x, double), e.cast(y, double)
    whole = truncate(e, double, _exact_quotient(e, x, y))
    taken = f"tl.where({whole.text} == 0, 0.0, {whole.text} * {y.text})"  # y may be infinite
    rest = e.let(f"{x.text} - {taken}", double, [x, y])
    if rounding == "floor":
        wrong = f"({rest.text} != 0) & (({rest.text} < 0) != ({y.text} < 0))"
        below = e.let(wrong, torch.bool, [rest, y])
        one_less = f"tl.where({below.text}, {whole.text} - 1.0, {whole.text})"
        added = f"tl.where({below.text}, {rest.text} + {y.text}, {rest.text})"
        whole = _unless_infinite(e, e.let(one_less, double, [whole, y]), rest, y)
        rest = e.let(added, double, [rest, y])
    return e.cast(whole, out), e.cast(rest, out)


def _unless_infinite(e: Emitter, whole: Value, rest: Value, y: Value) -> Value:
    """Where there is no remainder, torch has no whole quotient either, but by zero."""
    if y.number == 0:
        return whole
    text = f"tl.where({rest.text} == {rest.text}, {whole.text}, {rest.text})"
    if not y.is_number:
        text = f"tl.where({y.text} == 0, {whole.text}, {text})"
    return e.let(text, torch.float64, [whole, rest, y])


def _c_remainder(e: Emitter, out: torch.dtype, x: Value, y: Value) -> Value:
    size = max(abs(b) for b in bounds_of(y))
    return e.integer("{} % {}", out, [x, y], (-size, size) if not y.wide else None)


def _wrong_sign(e: Emitter, remainder: Value, y: Value) -> Value:
    """Where C's remainder, which has the dividend's sign, is not Python's."""
    if bounds_of(y)[0] > 0:
        return e.let(f"{remainder.text} < 0", torch.bool, [remainder])
    text = f"({remainder.text} != 0) & (({remainder.text} < 0) != ({y.text} < 0))"
    return e.let(text, torch.bool, [remainder, y])


def remainder(e: Emitter, out: torch.dtype, x: Value, y: Value) -> Value:
    x, y = e.cast(x, out), e.cast(y, out)
    if out.is_floating_point:
        return _float_division(e, out, "floor", x, y)[1]
    remainder = _c_remainder(e, out, x, y)
    if bounds_of(x)[0] >= 0 and bounds_of(y)[0] > 0:
        return Value(remainder.text, out, remainder.depends, (0, bounds_of(y)[1] - 1))
    below = _wrong_sign(e, remainder, y)
    bounds = (0, bounds_of(y)[1] - 1) if bounds_of(y)[0] > 0 else remainder.bounds
    return e.integer(f"tl.where({below.text}, {{0}} + {{1}}, {{0}})", out, [remainder, y], bounds)


def truncate(e: Emitter, out: torch.dtype, x: Value) -> Value:
    if not out.is_floating_point:
        return x
    return e.let(f"tl.where({x.text} < 0, tl.ceil({x.text}), tl.floor({x.text}))", out, [x])


def fmod(e: Emitter, out: torch.dtype, x: Value, y: Value) -> Value:
    x, y = e.cast(x, out), e.cast(y, out)
    if not out.is_floating_point:
        return _c_remainder(e, out, x, y)
    return _float_division(e, out, "trunc", x, y)[1]
