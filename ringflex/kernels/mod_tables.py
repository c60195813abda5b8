"""Tables as generated code reads them: what it knows of each, and how a launch passes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringflex.kernels.scalars import INT32


class TableSpec(NamedTuple):
    """What the generated code knows of a table.

    Attributes:
        dtype, ndim: of the table.
        unit: whether the last stride is 1.
        wide: whether offsets need 64 bits, also into its gradient, which is contiguous.
    """

    dtype: torch.dtype
    ndim: int
    unit: bool
    wide: bool

    @classmethod
    def of(cls, table: Tensor) -> TableSpec:
        reach = sum((n - 1) * s for n, s in zip(table.shape, table.stride(), strict=True))
        unit = table.ndim > 0 and table.stride(-1) == 1
        return cls(table.dtype, table.ndim, unit, max(reach, table.numel()) > INT32[1])

    @property
    def entries(self) -> int:
        """Of the `tables` tuple: the pointer, sizes, and strides but a last one of 1."""
        return 1 + 2 * self.ndim - self.unit


def table_arguments(tables: Sequence[Tensor], specs: Sequence[TableSpec]) -> tuple[Any, ...]:
    """The `tables` tuple of a launch.

    Triton compiles anew for an integer that is 1 or a multiple of 16; as `2 n + 3`, none is.
    """
    arguments: list[Any] = []
    for table, spec in zip(tables, specs, strict=True):
        arguments.append(table)
        arguments += [2 * size + 3 for size in table.shape]
        strides = table.stride()[:-1] if spec.unit else table.stride()
        arguments += [2 * stride + 3 for stride in strides]
    return tuple(arguments)


def gradient_arguments(gradients: Sequence[tuple[Tensor, Tensor]]) -> tuple[Any, ...]:
    """The `into` tuple: of each table that wants a gradient, a contiguous accumulator and what
    `scatter_add` calls `aside`."""
    arguments: list[Any] = []
    for accumulator, aside in gradients:
        arguments += [accumulator, aside]
        arguments += [2 * stride + 3 for stride in accumulator.stride()[:-1]]
    return tuple(arguments)
