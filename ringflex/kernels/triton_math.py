"""Functions that generated mods call: elementary functions, and adding into gradients of tables.

Plain `@triton.jit` functions of arithmetic, comparisons and `tl.where`: they run on every GPU that
Triton serves and under its interpreter. The exception is `fast_tanh`, an NVIDIA instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

ADD = tl.constexpr(0)  # fp32 atomic additions, in any order
LARGEST = tl.constexpr(1)  # only find the largest addend
FIXED = tl.constexpr(2)  # integer additions, which give the same bits in any order


@triton.jit
def unchanged(score, b, h, q_idx, kv_idx, tables):
    """A score mod that does nothing."""
    return score


@triton.jit
def rounded_product(x, y):
    """x * y, which no compiler fuses with a following sum; the sign of a zero is kept."""
    product = x * y
    return tl.where(product == 0, product, tl.fma(x, y, 0.0))


@triton.jit
def fast_tanh(x):
    """The hardware's tanh (sm_75 and later); relative error 2^-11."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def level_tanh(x):
    """1 - 2 / (exp(2x) + 1): absolute error 2e-7. Scores, which are but exponents, want no more."""
    t = tl.exp2(x * 2.8853900817779268) + 1.0
    return 1.0 - 2.0 * tl.rsqrt(t * t)


@triton.jit
def accurate_tanh(x):
    """Relative error 8e-7: near zero by the series to x^7, which loses no digits there."""
    far = level_tanh(x)
    y = x * x
    series = (-0.053968254 * y + 0.13333333) * y - 0.33333334
    near = x + x * (y * series)
    return tl.where(y < 0.04, near, far)


@triton.jit
def erfc(x):
    """Relative error 1e-6 up to x = 3, 8e-6 beyond: the Chebyshev fit of `erfcc` in Press et al.,
    "Numerical Recipes"."""
    t = 1.0 / (1.0 + 0.5 * tl.abs(x))
    y = (t * 0.17087277 - 0.82215223) * t + 1.48851587
    y = ((y * t - 1.13520398) * t + 0.27886807) * t - 0.18628806
    y = ((y * t + 0.09678418) * t + 0.37409196) * t + 1.00002368
    far = t * tl.exp(y * t - 1.26551223 - x * x)
    return tl.where(x < 0, 2.0 - far, far)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def log1p(x):
    """log(1 + x), without loss where x is small (Goldberg, 1991, theorem 4)."""
    u = 1.0 + x
    lost = (u == 1.0) | (u == float("inf"))
    safe = tl.where(lost, 2.0, u)
    return tl.where(lost, tl.where(u == 1.0, x, u), tl.log(safe) * (x / (safe - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1, without loss where x is small (Higham, 2002, section 1.14.1)."""
    u = tl.exp(x)
    plain = (u == 1.0) | (u - 1.0 == -1.0) | (u == float("inf"))
    safe = tl.where(plain, 2.0, u)
    value = (safe - 1.0) * x / tl.log(safe)
    return tl.where(plain, tl.where(u == 1.0, x, u - 1.0), value)


@triton.jit
def softplus(x, beta, threshold):
    y = x * beta
    return tl.where(y > threshold, x, log1p(tl.exp(tl.minimum(y, threshold))) / beta)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + accurate_tanh(inner))


@triton.jit
def round_half_even(x):
    down = tl.floor(x)
    rest = x - down
    odd = down - 2.0 * tl.floor(down * 0.5) != 0
    return tl.where((rest > 0.5) | ((rest == 0.5) & odd), down + 1.0, down)


@triton.jit
def power(x, y):
    """x^y, by base-2 logarithm; negative x with whole y."""
    magnitude = tl.exp2(y * tl.log2(tl.abs(x)))
    magnitude = tl.where(x == 0, tl.where(y < 0, float("inf"), 0.0), magnitude)
    fraction = y - tl.floor(y)
    parity = y - 2.0 * tl.floor(y * 0.5)  # 1 for odd y
    negative = tl.where(parity == 1.0, -magnitude, magnitude)
    negative = tl.where(fraction == 0, negative, float("nan"))
    result = tl.where(x < 0, negative, magnitude)
    return tl.where(y == 0, 1.0, tl.where(x == 1.0, 1.0, result))


@triton.jit
def scatter_add(
    pointer,
    aside,
    offset,
    value,
    HOW: tl.constexpr,
    BY_Q: tl.constexpr,
    BY_KV: tl.constexpr,
    Q_AXIS: tl.constexpr,
):
    """Adds a tile of values into a table's gradient, at offsets that may repeat.

    Where the offset does not depend on the query (or the key), the tile is summed over it first,
    and is a row or a column from then on: of a tile with a dimension of 1, threads of a Gluon
    kernel hold some values several times, and would add each of them.
    `aside` is where LARGEST leaves the bits of the largest magnitude, and where FIXED finds the
    power of two that addends are multiplied by.
    """
    if not BY_Q:
        value = tl.sum(value, axis=Q_AXIS, keep_dims=True)
    if not BY_KV:
        value = tl.sum(value, axis=1 - Q_AXIS, keep_dims=True)
    if HOW == LARGEST:
        bits = tl.abs(value).to(tl.int32, bitcast=True)  # ordered as the numbers are, NaN above all
        tl.atomic_max(aside, tl.max(tl.max(bits, axis=1), axis=0), sem="relaxed")
    else:
        if not BY_Q:
            value = tl.sum(value, axis=Q_AXIS)
            if BY_KV:
                offset = tl.max(offset, axis=Q_AXIS)
            else:
                value = tl.sum(value, axis=0)
        elif not BY_KV:
            value = tl.sum(value, axis=1 - Q_AXIS)
            offset = tl.max(offset, axis=1 - Q_AXIS)
        if HOW == FIXED:
            factor = tl.load(aside)
            value = (value.to(tl.float64) * factor).to(tl.int64)
        tl.atomic_add(pointer + offset, value, mask=value != 0, sem="relaxed")
