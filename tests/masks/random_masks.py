"""Random masks, drawn as source text: a failing example reads like a mask that a user wrote.

`MaskText` is a grammar over `b, h, q_idx, kv_idx` with integers, floating point of every width and
captured tensors of every dtype, extreme values, infinities and NaN among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from ringflex.masks.trace import IndexByTensor

EXTENT = 24  # queries, keys, and entries of a captured tensor
LONG = 4200  # entries of a captured tensor that the bounds keep as ranges

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INT_CONSTANTS = (0, 1, 2, 3, 5, 7, 16, -1, -4, 23, 100, 200, -300, 2**24 + 1, 2**31, 2**40 - 1)
FLOAT_CONSTANTS = (0.1, 0.5, 1 / 3, -2.5, 7.0, 1e-3, 23.4, 0.0, 65504.0, 1e30, 1e-40)
COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
# What torch itself refuses is no mask: an int8 tensor with some constants, a division by zero.
REFUSALS = ("without overflow", "ZeroDivision", "not implemented for")


class RandomMask(NamedTuple):
    """A mask's source, the tensors it captures, and the first position to look at."""

    text: str
    captured: dict[str, Tensor]
    base: int

    def function(self) -> Callable[..., Tensor]:
        names = {"torch": torch, **self.captured}
        mask_mod: Callable[..., Tensor] = eval(f"lambda b, h, q_idx, kv_idx: {self.text}", names)
        return mask_mod


def capture(seed: int, dtype: torch.dtype, shape: tuple[int, ...], wild: bool) -> Tensor:
    """Ascending values with some noise; `wild` ones are extreme, infinite or NaN here and there."""
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(np.sort(rng.integers(-9, 30, (*shape, 1)), axis=-1 - bool(shape)))
    values = values.squeeze(-1)
    if dtype == torch.bool:
        return values > 5
    if dtype.is_floating_point:
        table = (values + torch.from_numpy(np.asarray(rng.random(shape)))).to(dtype)
        extremes = [math.nan, math.inf, -math.inf, 6e4, -0.0, torch.finfo(dtype).max]
    else:
        table = values.clamp(min=max(-9, torch.iinfo(dtype).min)).to(dtype)
        extremes = [torch.iinfo(dtype).min, torch.iinfo(dtype).max]
    if wild:
        at = torch.from_numpy(rng.integers(0, table.numel(), 3))
        chosen = torch.tensor([extremes[i] for i in rng.integers(0, len(extremes), 3)])
        table.view(-1)[at] = chosen.to(dtype)
    return table


class MaskText:
    """Draws expressions; `depth` bounds how deep they nest."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw
        self.captured: dict[str, Tensor] = {}

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def capture(self, dtype: torch.dtype, *shape: int) -> str:
        name = f"t{len(self.captured)}"
        seed, wild = self.draw(st.integers(0, 99)), self.pick(False, False, True)
        self.captured[name] = capture(seed, dtype, shape, wild)
        return name

    def place(self, depth: int) -> str:
        """An index in `-EXTENT .. EXTENT - 1`."""
        return str(
            self.pick(
                *[f"{i} % {EXTENT}" for i in ("q_idx", "kv_idx", "(q_idx + 1)", "(kv_idx - 3)")],
                f"q_idx.clamp(max={EXTENT - 1})",
                f"kv_idx % {EXTENT} - {EXTENT}",
                f"(q_idx - kv_idx).clamp(-5, {EXTENT - 5})",
                *([f"({self.integer(depth - 1)}).long() % {EXTENT}"] if depth > 0 else []),
            )
        )

    def read(self, depth: int, dtype: torch.dtype) -> str:
        place = self.place(depth)
        kind = self.pick("1d", "1d", "2d", "nested", "row", "long", "0d", "square")
        if kind == "0d":
            return self.capture(dtype)
        if kind == "long":
            return f"{self.capture(dtype, LONG)}[({place}) * 170]"
        if kind == "square":
            return f"{self.capture(dtype, EXTENT, EXTENT)}[{place}, {self.place(0)}]"
        if kind == "1d":
            return f"{self.capture(dtype, EXTENT)}[{place}]"
        name = self.capture(dtype, 2, EXTENT)
        first = self.pick("b", "h", "-1", "q_idx % 2")
        return f"{name}[{first}][{place}]" if kind == "nested" else f"{name}[{first}, {place}]"

    def integer(self, depth: int) -> str:
        if depth <= 0:
            return str(self.pick("q_idx", "kv_idx", "q_idx", "kv_idx", "q_idx - kv_idx", "h", "b"))
        x, kind = f"({self.integer(depth - 1)})", self.pick(*"ccccbbdsumrwtfe")
        if kind == "c":
            return f"{x} {self.pick('+', '-', '*')} {self.pick(*INT_CONSTANTS)}"
        if kind == "b":
            return f"{x} {self.pick('+', '-', '*', '&', '|', '^')} ({self.integer(depth - 1)})"
        if kind == "d":
            divisor = self.pick(1, 2, 3, 7, -3, -8, f"(({self.integer(depth - 2)}).abs() + 1)")
            operation = self.pick("{} // {}", "{} % {}", "torch.fmod({}, {})", "trunc")
            if operation == "trunc":
                operation = "torch.div({}, {}, rounding_mode='trunc')"
            return str(operation.format(x, divisor))
        if kind == "s":
            return f"{x} {self.pick('<<', '>>')} {self.pick(0, 1, 3, 9)}"
        if kind == "u":
            return str(self.pick("-{}", "~{}", "{}.abs()", "{} ** 2", "torch.sign({})").format(x))
        if kind == "m":
            other = self.integer(depth - 1)
            low, high = self.pick(-3, 2), self.pick(9, 100, 1)
            return str(
                self.pick(
                    f"torch.minimum({x}, {other})",
                    f"torch.maximum({x}, {other})",
                    f"torch.clamp({x}, {low}, {high})",
                )
            )
        if kind == "r":
            return self.read(depth, self.pick(*INTEGERS))
        if kind == "w":
            return f"torch.where({self.mask(depth - 1)}, {x}, {self.integer(depth - 1)})"
        if kind == "t":
            return f"{x}.to(torch.{self.pick('int8', 'uint8', 'int16', 'int32', 'int64')})"
        if kind == "f":
            return f"({self.real(depth - 1)}).to(torch.{self.pick('int64', 'int32', 'int8')})"
        return f"({self.mask(depth - 1)}).long()"

    def real(self, depth: int) -> str:
        if depth <= 0:
            return f"{self.pick('q_idx', 'kv_idx')} * {self.pick(*FLOAT_CONSTANTS)}"
        x, kind = f"({self.real(depth - 1)})", self.pick(*"ccbbufdmrwti")
        if kind == "c":
            return f"{x} {self.pick('+', '-', '*', '/')} {self.pick(*FLOAT_CONSTANTS)}"
        if kind == "b":
            other = self.pick(self.real, self.integer)(depth - 1)
            return f"{x} {self.pick('+', '-', '*', '/')} ({other})"
        if kind == "u":
            return str(self.pick("-{}", "{}.abs()", "{} ** 2", "{} ** 3").format(x))
        if kind == "f":
            function = self.pick(
                *("tanh", "exp", "exp2", "log", "log2", "sqrt", "sigmoid", "sin", "cos", "rsqrt"),
                *("floor", "ceil", "round", "trunc", "sign", "relu"),
            )
            return f"torch.{function}({x})"
        if kind == "d":
            return f"{x} {self.pick('//', '%')} {self.pick(0.3, 2.0, -1.5, 4)}"
        if kind == "m":
            other, low, high = self.real(depth - 1), self.pick(-3.5, 0.1), self.pick(9.7, 1)
            return str(
                self.pick(
                    f"torch.minimum({x}, {other})",
                    f"torch.maximum({x}, {other})",
                    f"torch.clamp({x}, {low}, {high})",
                )
            )
        if kind == "r":
            return self.read(depth, self.pick(*FLOATS))
        if kind == "w":
            return f"torch.where({self.mask(depth - 1)}, {x}, {self.pick('-torch.inf', '0.5')})"
        if kind == "t":
            return f"{x}.to(torch.{self.pick('float16', 'bfloat16', 'float32', 'float64')})"
        return f"({self.integer(depth - 1)}).to(torch.{self.pick('float16', 'float32', 'float64')})"

    def mask(self, depth: int) -> str:
        if depth <= 0:
            return str(
                self.pick("q_idx >= kv_idx", "q_idx - kv_idx < 7", "kv_idx < 5", "q_idx != 3")
            )
        kind, compare = self.pick(*"iirrxccannlw"), self.pick(*COMPARISONS)
        if kind == "i":
            return f"({self.integer(depth)}) {compare} ({self.integer(depth - 1)})"
        if kind == "r":
            return f"({self.real(depth)}) {compare} ({self.real(depth - 1)})"
        if kind == "x":
            return f"({self.integer(depth)}) {compare} ({self.real(depth - 1)})"
        if kind == "c":
            value = self.pick(*INT_CONSTANTS, *FLOAT_CONSTANTS)
            return f"({self.pick(self.integer, self.real)(depth)}) {compare} {value}"
        x = f"({self.mask(depth - 1)})"
        if kind == "a":
            return f"{x} {self.pick('&', '|', '^', '==', '<', '+', '*')} ({self.mask(depth - 1)})"
        if kind == "n":
            return f"~{x}"
        if kind == "l":
            other = self.pick(self.integer, self.real, self.mask)(depth - 1)
            return str(
                self.pick(
                    f"({other}).bool()",
                    f"torch.logical_not({other})",
                    f"torch.logical_xor({x}, {other})",
                    self.read(depth, torch.bool),
                )
            )
        return f"torch.where({x}, {self.mask(depth - 1)}, {self.mask(depth - 1)})"


@st.composite
def random_masks(draw: Callable[[st.SearchStrategy[Any]], Any]) -> RandomMask:
    """A random mask; every third compares an expression with a value that the expression takes."""
    source = MaskText(draw)
    base = source.pick(0, 0, 0, 2**11 - 8, 2**24 - 8, 2**31 - 8, 2**53 - 8)
    depth = draw(st.integers(1, 4))
    if source.pick(False, False, True):
        text = source.pick(source.real, source.real, source.integer)(min(depth, 3))
        drawn = [draw(st.integers(0, 1)) for _ in "bh"]
        drawn += [base + draw(st.integers(0, EXTENT - 1)) for _ in "qk"]
        expression = RandomMask(text, source.captured, base).function()
        try:
            with IndexByTensor():
                value = expression(*map(torch.tensor, drawn))
        except RuntimeError as error:
            assume(not any(refusal in str(error) for refusal in REFUSALS))
            raise
        source.captured["value"] = value
        threshold = source.pick("value", repr(value.item()).replace("inf", "torch.inf"))
        text = f"({text}) {source.pick(*COMPARISONS)} {threshold.replace('nan', 'torch.nan')}"
    else:
        text = source.mask(depth)
    return RandomMask(text, source.captured, base)
