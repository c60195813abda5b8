"""aten operations on scalars as Triton source: one rule per operation.

Approximations, as errors relative to the result, in fp32: `tanh` 8e-7 (absolute 2e-7 where it is
only scaled and added to the score, as in a softcap), `erf`, `log1p`, `expm1` and `softplus` 1e-6,
`erfc` 8e-6; `pow(x, y)` with y not a small integer 2e-7 * (1 + abs(y * log2(x))); `division_rules`
has those of quotients. With the option `approximate_tanh`, `tanh` is the GPU's own instruction on
NVIDIA (sm_75 and later), relative error 2^-11 = 5e-4.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch

from ringflex.kernels.division_rules import (
    SETTLED,
    divide,
    floor_divide,
    fmod,
    remainder,
    truncate,
)
from ringflex.kernels.scalars import (
    INT32,
    Emitter,
    Number,
    Unsupported,
    Value,
    as_tensor,
    bounds_of,
    corners,
    number,
    operands,
    range_of,
    widened,
    within,
)

Rule = Callable[..., Value]


def _arithmetic(symbol: str, f: Callable[[int, int], int]) -> Rule:
    def rule(
        e: Emitter, out: torch.dtype, x: Value, y: Value, *, alpha: Value | None = None
    ) -> Value:
        if alpha is not None and alpha.number != 1:
            y = RULES[_aten.mul](e, out, y, alpha)
        if out == torch.bool:  # True + True is True
            return _bitwise("|" if symbol == "+" else "&")(e, out, x, y)
        x, y = operands(e, out, x, y)
        if x.is_number and y.is_number:
            return number(f(x.number, y.number), out)  # type: ignore[arg-type]
        if out.is_floating_point:
            text = f"{x.text} {symbol} {y.text}"
            if symbol == "*" and not e.fuses:
                text = f"rounded_product({as_tensor(e, x)}, {as_tensor(e, y)})"
            return e.settle(e.let(text, out, [x, y]), out)
        return e.integer(f"{{}} {symbol} {{}}", out, [x, y], corners(f, x, y))

    return rule


def _like(x: Value) -> Any:
    """An example for torch's promotion: a number counts less than a tensor."""
    return x.number if x.weak else torch.empty((1,), dtype=x.dtype)


def _common(e: Emitter, *values: Value) -> list[Value]:
    """Operands as a comparison sees them."""
    dtype = torch.result_type(_like(values[0]), _like(values[1]))
    return [e.cast(x, dtype) for x in values]


def _comparison(symbol: str) -> Rule:
    def rule(e: Emitter, out: torch.dtype, x: Value, y: Value) -> Value:
        x, y = _common(e, x, y)
        if x.is_number and y.is_number:
            return number(bool(_COMPARE[symbol](x.number, y.number)), torch.bool)
        if x.dtype.is_floating_point:
            text = f"{x.text} {symbol} {y.text}"
            if (x.depends | y.depends) <= {"b", "h"}:  # the interpreter takes it for no boolean
                text = f"tl.where({text}, 1, 0) != 0"
            return e.let(text, torch.bool, [x, y])
        known = {_COMPARE[symbol](a, b) for a in bounds_of(x) for b in bounds_of(y)}
        if symbol not in ("==", "!=") and len(known) == 1:  # whatever the indices
            return number(known.pop(), torch.bool)
        narrow = within(bounds_of(x), INT32) and within(bounds_of(y), INT32)
        one, other = (v.text if narrow else widened(v) for v in (x, y))
        return e.let(f"{one} {symbol} {other}", torch.bool, [x, y])

    return rule


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def _bitwise(symbol: str, *, logical: bool = False) -> Rule:
    f = {"&": operator.and_, "|": operator.or_, "^": operator.xor}[symbol]

    def rule(e: Emitter, out: torch.dtype, x: Value, y: Value) -> Value:
        kind = torch.bool if logical else out
        x, y = e.cast(x, kind), e.cast(y, kind)
        if x.is_number and y.is_number:
            return number(f(x.number, y.number), kind)
        if kind == torch.bool:
            for known, other in ((x, y), (y, x)):
                if known.is_number:
                    absorbing = known.number == (symbol == "|")
                    if symbol == "^":
                        return _not(e, out, other) if known.number else other
                    return number(bool(known.number), kind) if absorbing else other
            return e.let(f"{x.text} {symbol} {y.text}", kind, [x, y])
        bounds = range_of(kind)
        if symbol == "&" and (bounds_of(x)[0] >= 0 or bounds_of(y)[0] >= 0):
            bounds = (0, min(b[1] for b in (bounds_of(x), bounds_of(y)) if b[0] >= 0))
        elif within(x.bounds, INT32) and within(y.bounds, INT32):
            bounds = INT32
        return e.integer(f"{{}} {symbol} {{}}", kind, [x, y], bounds)

    return rule


def _not(e: Emitter, out: torch.dtype, x: Value) -> Value:
    if out != torch.bool:
        low, high = bounds_of(x)
        return e.integer("~{}", out, [x], (~high, ~low))
    x = e.cast(x, torch.bool)
    if x.is_number:
        return number(not x.number, torch.bool)
    return e.let(f"{x.text} == 0", torch.bool, [x])


def _shift(symbol: str) -> Rule:
    def rule(e: Emitter, out: torch.dtype, x: Value, y: Value) -> Value:
        x, y = e.cast(x, out), e.cast(y, out)
        low, high = bounds_of(y)
        bounds = None
        if low >= 0 and high < 32:
            f = operator.lshift if symbol == "<<" else operator.rshift
            bounds = corners(f, x, y)
        return e.integer(f"{{}} {symbol} {{}}", out, [x, y], bounds)

    return rule


def _extremum(name: str, f: Callable[..., int]) -> Rule:
    def rule(e: Emitter, out: torch.dtype, x: Value, y: Value) -> Value:
        x, y = e.cast(x, out), e.cast(y, out)
        if x.is_number and y.is_number:
            return number(f(x.number, y.number), out)
        if out == torch.bool:
            return _bitwise("&" if f is min else "|")(e, out, x, y)
        if out.is_floating_point:
            text = f"tl.{name}({as_tensor(e, x)}, {y.text}, propagate_nan=tl.PropagateNan.ALL)"
            return e.let(text, out, [x, y])
        bounds = tuple(f(a, b) for a, b in zip(bounds_of(x), bounds_of(y), strict=True))
        return e.integer(f"tl.{name}({{}}, {{}})", out, [x, y], cast(tuple[int, int], bounds))

    return rule


_minimum, _maximum = _extremum("minimum", min), _extremum("maximum", max)


def _clamp(
    e: Emitter, out: torch.dtype, x: Value, min: Value | None = None, max: Value | None = None
) -> Value:
    x = x if min is None else _maximum(e, out, x, min)
    return x if max is None else _minimum(e, out, x, max)


def _where(e: Emitter, out: torch.dtype, condition: Value, x: Value, y: Value) -> Value:
    condition = e.cast(condition, torch.bool)
    x, y = e.cast(x, out), e.cast(y, out)
    if condition.is_number:
        return x if condition.number else y
    if out == torch.bool:
        inverse = _not(e, torch.bool, condition)
        both = _bitwise("&")(e, torch.bool, condition, x), _bitwise("&")(e, torch.bool, inverse, y)
        return _bitwise("|")(e, torch.bool, *both)
    text = f"tl.where({condition.text}, {{}}, {{}})"
    if out.is_floating_point:
        if x.is_number and y.is_number:
            x = Value(as_tensor(e, x), x.dtype)
        return e.let(text.format(x.text, y.text), out, [condition, x, y])
    (a, b), (c, d) = bounds_of(x), bounds_of(y)
    value = e.integer(text, out, [x, y], (min(a, c), max(b, d)))
    return Value(value.text, out, value.depends | condition.depends, value.bounds)


def _negative(e: Emitter, out: torch.dtype, x: Value) -> Value:
    x = e.cast(x, out)
    if out.is_floating_point and not x.is_number:  # 0 - x would lose the sign of a zero
        return e.let(f"{x.text} * -1.0", out, [x])
    return _arithmetic("-", operator.sub)(e, out, number(0, out), x)


def _absolute(e: Emitter, out: torch.dtype, x: Value) -> Value:
    x = e.cast(x, out)
    if out.is_floating_point:
        return e.let(f"tl.abs({x.text})", out, [x])
    low, high = bounds_of(x)
    return e.integer("tl.abs({})", out, [x], (0, max(abs(low), abs(high))))


def _sign(e: Emitter, out: torch.dtype, x: Value) -> Value:
    if out == torch.bool:
        return x
    zero, one = number(0, out).text, number(1, out).text
    below = f"tl.where({x.text} < 0, -{one}, {zero})"
    text = f"tl.where({x.text} > 0, {one}, {below})"
    return e.let(text, out, [x], None if out.is_floating_point else (-1, 1))


def _function(template: str) -> Rule:
    """A function of one floating-point operand `{0}`."""

    def rule(e: Emitter, out: torch.dtype, x: Value, **_: Any) -> Value:
        x = e.cast(x, out)
        return e.settle(e.let(template.format(as_tensor(e, x)), out, [x]), out)

    return rule


def _square_root(e: Emitter, out: torch.dtype, x: Value) -> Value:
    exact = x.depends <= SETTLED and out != torch.float64
    return _function("tl.sqrt_rn({0})" if exact else "tl.sqrt({0})")(e, out, x)


def _rounding(template: str) -> Rule:
    def rule(e: Emitter, out: torch.dtype, x: Value, **options: Any) -> Value:
        if options:
            raise Unsupported("to a number of decimals")
        if not out.is_floating_point:
            return x
        return e.let(template.format(as_tensor(e, x)), out, [x])

    return rule


def _tanh(e: Emitter, out: torch.dtype, x: Value) -> Value:
    name = "accurate_tanh" if out == torch.float64 else e.tanh  # the GPU's own is of fp32
    return _function(f"{name}({{0}})")(e, out, x)


def _power(e: Emitter, out: torch.dtype, x: Value, y: Value) -> Value:
    exponent = y.number
    if exponent is not None and not x.is_number:
        if not out.is_floating_point and exponent < 0:
            raise Unsupported("an integer to a negative power")
        if float(exponent).is_integer() and abs(exponent) <= 8:
            return _repeated(e, out, e.cast(x, out), int(exponent))
        if exponent == 0.5:
            return RULES[_aten.sqrt](e, out, x)
    if not out.is_floating_point:
        raise Unsupported("an integer to a power that is not a small number")
    x, y = e.cast(x, out), e.cast(y, out)
    return e.settle(e.let(f"power({as_tensor(e, x)}, {as_tensor(e, y)})", out, [x, y]), out)


def _repeated(e: Emitter, out: torch.dtype, x: Value, n: int) -> Value:
    if n == 0:
        return number(1, out)
    multiply = RULES[_aten.mul]
    result = None
    power = x
    bits = abs(n)
    while bits:
        if bits & 1:
            result = power if result is None else multiply(e, out, result, power)
        bits >>= 1
        if bits:
            power = multiply(e, out, power, power)
    assert result is not None
    return result if n > 0 else divide(e, out, number(1, out), result)


def _filled(value: Number) -> Rule:
    return lambda e, out, *_, **__: number(value, out)


def _gelu(e: Emitter, out: torch.dtype, x: Value, *, approximate: Any = None) -> Value:
    return _function("gelu_tanh({0})" if approximate == "tanh" else "gelu({0})")(e, out, x)


def _softplus(
    e: Emitter,
    out: torch.dtype,
    x: Value,
    beta: Value | None = None,
    threshold: Value | None = None,
) -> Value:
    b = "1.0" if beta is None else e.cast(beta, torch.float32).text
    t = "20.0" if threshold is None else e.cast(threshold, torch.float32).text
    return _function(f"softplus({{0}}, {b}, {t})")(e, out, x)


def _leaky_relu(e: Emitter, out: torch.dtype, x: Value, slope: Value | None = None) -> Value:
    s = "0.01" if slope is None else e.cast(slope, torch.float32).text
    return _function(f"tl.where({{0}} > 0, {{0}}, {{0}} * {s})")(e, out, x)


def _elu(
    e: Emitter,
    out: torch.dtype,
    x: Value,
    alpha: Value | None = None,
    scale: Value | None = None,
    input_scale: Value | None = None,
) -> Value:
    a, s, i = (
        "1.0" if v is None else e.cast(v, torch.float32).text for v in (alpha, scale, input_scale)
    )
    negative = f"expm1({{0}} * {i}) * {a} * {s}"
    return _function(f"tl.where({{0}} > 0, {{0}} * {s}, {negative})")(e, out, x)


def _reverse(rule: str) -> Rule:
    return lambda e, out, x, y, **kw: RULES[getattr(_aten, rule)](e, out, y, x, **kw)


_aten = torch.ops.aten
RULES: dict[Any, Rule] = {
    _aten.add: _arithmetic("+", operator.add),
    _aten.sub: _arithmetic("-", operator.sub),
    _aten.mul: _arithmetic("*", operator.mul),
    _aten.rsub: _reverse("sub"),
    _aten.div: divide,
    _aten.floor_divide: floor_divide,
    _aten.remainder: remainder,
    _aten.fmod: fmod,
    _aten.neg: _negative,
    _aten.abs: _absolute,
    _aten.sign: _sign,
    _aten.sgn: _sign,
    _aten.reciprocal: lambda e, out, x: divide(e, out, number(1, out), x),
    _aten.lt: _comparison("<"),
    _aten.le: _comparison("<="),
    _aten.gt: _comparison(">"),
    _aten.ge: _comparison(">="),
    _aten.eq: _comparison("=="),
    _aten.ne: _comparison("!="),
    _aten.isnan: lambda e, out, x: e.let(f"{x.text} != {x.text}", torch.bool, [x]),
    _aten.isinf: lambda e, out, x: e.let(f'tl.abs({x.text}) == float("inf")', torch.bool, [x]),
    _aten.bitwise_and: _bitwise("&"),
    _aten.bitwise_or: _bitwise("|"),
    _aten.bitwise_xor: _bitwise("^"),
    _aten.__and__: _bitwise("&"),
    _aten.__or__: _bitwise("|"),
    _aten.__xor__: _bitwise("^"),
    _aten.bitwise_not: _not,
    _aten.logical_and: _bitwise("&", logical=True),
    _aten.logical_or: _bitwise("|", logical=True),
    _aten.logical_xor: _bitwise("^", logical=True),
    _aten.logical_not: _not,
    _aten.bitwise_left_shift: _shift("<<"),
    _aten.bitwise_right_shift: _shift(">>"),
    _aten.__lshift__: _shift("<<"),
    _aten.__rshift__: _shift(">>"),
    _aten.where: _where,
    _aten.masked_fill: lambda e, out, x, mask, value: _where(e, out, mask, value, x),
    _aten.minimum: _minimum,
    _aten.maximum: _maximum,
    _aten.clamp: _clamp,
    _aten.clamp_min: lambda e, out, x, low: _maximum(e, out, x, low),
    _aten.clamp_max: lambda e, out, x, high: _minimum(e, out, x, high),
    _aten.hardtanh: lambda e, out, x, low=None, high=None: _clamp(
        e, out, x, low or number(-1.0), high or number(1.0)
    ),
    _aten.relu: lambda e, out, x: _maximum(e, out, x, number(0, out)),
    _aten.leaky_relu: _leaky_relu,
    _aten.elu: _elu,
    _aten.exp: _function("tl.exp({0})"),
    _aten.exp2: _function("tl.exp2({0})"),
    _aten.expm1: _function("expm1({0})"),
    _aten.log: _function("tl.log({0})"),
    _aten.log2: _function("tl.log2({0})"),
    _aten.log10: _function("tl.log2({0}) * 0.3010299956639812"),
    _aten.log1p: _function("log1p({0})"),
    _aten.sqrt: _square_root,
    _aten.rsqrt: _function("tl.rsqrt({0})"),
    _aten.square: lambda e, out, x: _repeated(e, out, x, 2),
    _aten.sin: _function("tl.sin({0})"),
    _aten.cos: _function("tl.cos({0})"),
    _aten.tan: _function("(tl.sin({0}) / tl.cos({0}))"),
    _aten.tanh: _tanh,
    _aten.sigmoid: _function("sigmoid({0})"),
    _aten.silu: _function("{0} * sigmoid({0})"),
    _aten.gelu: _gelu,
    _aten.erf: _function("tl.erf({0})"),
    _aten.erfc: _function("erfc({0})"),
    _aten.softplus: _softplus,
    _aten.log_sigmoid_forward: _function("-softplus(-{0}, 1.0, 20.0)"),
    _aten.mish: _function("{0} * accurate_tanh(softplus({0}, 1.0, 20.0))"),
    _aten.pow: _power,
    _aten.floor: _rounding("tl.floor({0})"),
    _aten.ceil: _rounding("tl.ceil({0})"),
    _aten.round: _rounding("round_half_even({0})"),
    _aten.trunc: truncate,
    _aten._to_copy: lambda e, out, x, **_: e.cast(x, out),
    _aten.clone: lambda e, out, x, **_: x,
    _aten.alias: lambda e, out, x: x,
    _aten.detach: lambda e, out, x: x,
    _aten.lift_fresh_copy: lambda e, out, x: x,
    _aten.fill: lambda e, out, x, value: e.cast(value, out),
    _aten.full: lambda e, out, size, value, **_: e.cast(value, out),
    _aten.full_like: lambda e, out, x, value, **_: e.cast(value, out),
    _aten.new_full: lambda e, out, x, size, value, **_: e.cast(value, out),
    _aten.scalar_tensor: lambda e, out, value, **_: e.cast(value, out),
    _aten.zeros_like: _filled(0),
    _aten.new_zeros: _filled(0),
    _aten.zeros: _filled(0),
    _aten.ones_like: _filled(1),
    _aten.ones: _filled(1),
    _aten.new_ones: _filled(1),
}
