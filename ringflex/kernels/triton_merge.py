"""What a forward merges with what it computes, and where that is, for the kernels' arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringflex.kernels.contract import Partial, compute_dtype
from ringflex.kernels.stages import Stage
from ringflex.kernels.triton_setup import alignment, encoded_rows, strided


class Merge(NamedTuple):
    """See `triton_forward.forward_kernel`.

    Attributes:
        out, lse: where results go. before_out, before_lse: what was before, or out and lse.
        first_lse: of queries that begin.
        with_out, with_lse, in_place, staged, with_first: what the kernel is compiled for.
    """

    out: Tensor
    lse: Tensor
    before_out: Tensor
    before_lse: Tensor
    first_lse: Tensor
    with_out: bool
    with_lse: bool
    in_place: bool
    staged: bool
    with_first: bool

    @classmethod
    def of(
        cls, before: Partial | None, after: Partial, stage: Stage | None, running: Partial | None
    ) -> Merge:
        """From what a forward is given, see `contract`."""
        out, lse = after
        assert out is not None
        if stage is not None and stage.is_selection:  # lists of queries, without turns, serve
            assert before is None or before.out is None
            stage = None
        first_lse = lse if before is None else before.lse
        with_first = stage is not None and before is not None
        if stage is not None:  # with what is running, or, where a query begins, with first_lse
            assert before is None or before.out is None
            before = _never_read(after) if running is None else running
        before_out = out if before is None or before.out is None else before.out
        before_lse = lse if before is None else before.lse
        with_out = before is not None and before.out is not None
        in_place = with_out and before_out is out and before_lse is lse
        return cls(
            out, lse, before_out, before_lse, first_lse,
            with_out, before is not None, in_place, stage is not None, with_first,
        )  # fmt: skip

    @property
    def key(self) -> Any:
        """What kernels are compiled for."""
        tensors = self[:5]
        return (
            *((x.dtype, x.stride()) for x in tensors), alignment(*tensors), *self[5:],
        )  # fmt: skip

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The kernel's: out, lse, before_out, before_lse, first_lse."""
        return (
            strided(self.out), encoded_rows(self.lse), strided(self.before_out),
            encoded_rows(self.before_lse), encoded_rows(self.first_lse),
        )  # fmt: skip

    @property
    def constants(self) -> tuple[bool, ...]:
        """The kernel's: MERGE_OUT, MERGE_LSE, IN_PLACE, STAGED, MERGE_FIRST."""
        return self[5:]


def _never_read(after: Partial) -> Partial:
    """What is running, of nothing: a row of memory in the place of all."""
    assert after.out is not None
    row = after.out.new_empty(1, 1, 1, after.out.shape[3], dtype=compute_dtype(after.out.dtype))
    lse = after.lse.new_empty(1, 1, 1, dtype=torch.float64)
    return Partial(row.expand(after.out.shape), lse.expand(after.lse.shape))
