"""Scalars of a mod in generated Triton source: what is known of each, and how it is written.

Every value is one scalar per score: a name in the generated function or a number, its torch dtype,
and which of the function's inputs it depends on. Booleans are int1, integers int32 or int64
(whichever holds every value they can take), half and single precision fp32, double fp64. What a
dtype of the graph cannot hold is rounded or wrapped to it, as torch would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch

Number = bool | int | float
HALF = (torch.float16, torch.bfloat16)
LARGEST_INDEX = 2**30  # positions in a sequence: sums and differences of two fit in 32 bits
INT32 = (-(2**31), 2**31 - 1)


@dataclass(frozen=True)
class Value:
    """One scalar per score.

    Attributes:
        text: its name, or the number in words.
        dtype: in the graph.
        depends: inputs that it depends on: "score", "grad", "b", "h", "q_idx", "kv_idx".
        bounds: what it may be, of an integer: inclusive; None if anything.
        number: its value, if known.
        weak: a number that the user wrote, not a tensor: it bends to the other operand's dtype.
    """

    text: str
    dtype: torch.dtype
    depends: frozenset[str] = frozenset()
    bounds: tuple[int, int] | None = None
    number: Number | None = None
    weak: bool = False

    @property
    def is_number(self) -> bool:
        return self.number is not None

    @property
    def wide(self) -> bool:
        """Whether the integer is held in 64 bits."""
        return self.dtype == torch.int64 and not within(self.bounds, INT32)


def number(value: Number, dtype: torch.dtype | None = None) -> Value:
    """A number of the mod; without a dtype as it was written, to be rounded where it is used."""
    weak = dtype is None
    if dtype is None:
        kinds = {bool: torch.bool, int: torch.int64, float: torch.float32}
        dtype = kinds[type(value)]
    elif dtype == torch.bool:
        value = bool(value)
    elif dtype.is_floating_point:
        value = float(torch.tensor(float(value), dtype=dtype, device="cpu").item())
    elif isinstance(value, (int, float)):  # wrapped round, as torch does
        low, high = range_of(dtype)
        value = (int(value) - low) % (high - low + 1) + low
    if isinstance(value, float) and not math.isfinite(value):
        text = f'float("{value}")'
    elif dtype == torch.float64:
        text = _double(float(value))
    else:
        text = repr(value)
    if isinstance(value, (int, float)) and (value < 0):
        text = f"({text})"
    bounds = None if dtype.is_floating_point else (int(value), int(value))
    return Value(text, dtype, bounds=bounds, number=value, weak=weak)


def _double(value: float) -> str:
    """An fp64 number as the sum of fp32 ones, which is what Triton takes literals for."""
    parts: list[float] = []
    rest = value
    while rest and len(parts) < 3:
        part = torch.tensor(rest, dtype=torch.float32, device="cpu").item()
        if not math.isfinite(part):
            raise Unsupported(f"the number {value}")
        parts.append(part)
        rest -= part
    first, *others = map(repr, parts or [0.0])
    return f"({' + '.join([f'tl.cast({first}, tl.float64)', *others])})"


class Unsupported(Exception):
    """What cannot be written in Triton; says why."""


class Emitter:
    """Collects the lines of one generated function.

    Attributes:
        tanh: which function of `triton_math` to call.
        fuses: whether a product may be fused with a following sum, which rounds once instead of
            twice.
    """

    def __init__(self, *, tanh: str = "accurate_tanh", fuses: bool = True) -> None:
        self.lines: list[str] = []
        self.tanh, self.fuses = tanh, fuses
        self._names = 0
        self._known: dict[str, str] = {}

    def let(
        self,
        text: str,
        dtype: torch.dtype,
        operands: Iterable[Value] = (),
        bounds: tuple[int, int] | None = None,
    ) -> Value:
        """A new value; an expression that was written before is not written again."""
        depends = frozenset[str]().union(*(x.depends for x in operands))
        if text not in self._known:
            self._known[text] = f"x{self._names}"
            self.lines.append(f"x{self._names} = {text}")
            self._names += 1
        return Value(self._known[text], dtype, depends, bounds)

    def settle(self, value: Value, dtype: torch.dtype) -> Value:
        """What was computed in a wider type, in the dtype of the graph."""
        if value.is_number:
            return number(cast(Number, value.number), dtype)
        if dtype in HALF:
            half = f"{value.text}.to(tl.{TRITON_NAMES[dtype]}).to(tl.float32)"
            return self.let(half, dtype, [value])
        if dtype == torch.bool or dtype.is_floating_point:
            return Value(value.text, dtype, value.depends)
        info = torch.iinfo(dtype)
        if dtype in (torch.int64, torch.int32) or within(value.bounds, (info.min, info.max)):
            return Value(value.text, dtype, value.depends, value.bounds)
        wrapped = f"{value.text}.to(tl.{TRITON_NAMES[dtype]}).to(tl.int32)"
        return self.let(wrapped, dtype, [value], (info.min, info.max))

    def cast(self, x: Value, dtype: torch.dtype) -> Value:
        """A conversion as torch makes it."""
        if x.dtype == dtype and not x.weak:
            return x
        if x.is_number:
            value = cast(Number, x.number)
            if not dtype.is_floating_point and isinstance(value, float):
                value = bool(value) if dtype == torch.bool else int(value)
            return number(value, dtype)
        if dtype == torch.bool:
            return self.let(f"{x.text} != 0", dtype, [x])
        if dtype.is_floating_point:
            if dtype == torch.float64:
                return self.let(f"{x.text}.to(tl.float64)", dtype, [x])
            if not x.dtype.is_floating_point or x.dtype == torch.float64:
                x = self.let(f"{x.text}.to(tl.float32)", torch.float32, [x])
            return self.settle(x, dtype) if dtype in HALF else Value(x.text, dtype, x.depends)
        if x.dtype.is_floating_point:
            wide = self.let(f"{x.text}.to(tl.int64)", torch.int64, [x])
            return wide if dtype == torch.int64 else self._narrow(wide, dtype)
        if x.dtype == torch.bool:
            return self.let(f"{x.text}.to(tl.int32)", dtype, [x], (0, 1))
        if x.wide and dtype != torch.int64:
            return self._narrow(x, dtype)
        return self.settle(Value(x.text, x.dtype, x.depends, x.bounds or range_of(x.dtype)), dtype)

    def _narrow(self, x: Value, dtype: torch.dtype) -> Value:
        text = f"{x.text}.to(tl.{TRITON_NAMES[dtype]})"
        if dtype != torch.int32:
            text += ".to(tl.int32)"
        return self.let(text, dtype, [x], range_of(dtype))

    def integer(
        self, text: str, dtype: torch.dtype, operands: list[Value], bounds: tuple[int, int] | None
    ) -> Value:
        """An integer result of `text`, a format of the operands, in enough bits."""
        if dtype in (torch.int32, torch.int64) and not within(bounds, range_of(dtype)):
            bounds = None if dtype == torch.int64 else INT32  # it may wrap round
        wide = dtype == torch.int64 and not within(bounds, INT32)
        in_64_bits = wide or not all(within(bounds_of(x), INT32) for x in operands)
        expression = text.format(*(widened(x) if in_64_bits else x.text for x in operands))
        if in_64_bits and not wide:
            expression = f"({expression}).to(tl.int32)"
        return self.settle(self.let(expression, dtype, operands, bounds), dtype)


def within(bounds: tuple[int, int] | None, limits: tuple[int, int]) -> bool:
    return bounds is not None and limits[0] <= bounds[0] and bounds[1] <= limits[1]


def range_of(dtype: torch.dtype) -> tuple[int, int]:
    if dtype == torch.bool:
        return (0, 1)
    return (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


def widened(x: Value) -> str:
    """An integer as 64 bits hold it; a number is of any width."""
    return x.text if x.is_number or x.wide else f"{x.text}.to(tl.int64)"


def bounds_of(x: Value) -> tuple[int, int]:
    """What an integer may be."""
    return x.bounds if x.bounds is not None else range_of(x.dtype)


def corners(f: Callable[[int, int], int], x: Value, y: Value) -> tuple[int, int]:
    values = [f(a, b) for a in bounds_of(x) for b in bounds_of(y)]
    return min(values), max(values)


def operands(e: Emitter, out: torch.dtype, x: Value, y: Value) -> tuple[Value, Value]:
    """In the dtype of the result; numbers beside half precision stay as exact as fp32, as torch
    has them."""
    wide = torch.float32 if out in HALF else out
    x, y = (e.cast(v, wide if v.weak else out) for v in (x, y))
    return x, y


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_tensor(e: Emitter, x: Value) -> str:
    """A number where Triton wants a tensor."""
    if not x.is_number:
        return x.text
    return e.let(f"tl.cast({x.text}, tl.{TRITON_NAMES[exact_dtype(x.dtype)]})", x.dtype).text


TRITON_NAMES = {
    torch.bool: "int1",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
