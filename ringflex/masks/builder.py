"""Builds block masks by subdivision: halve what is undecided, down to the block size.

At most a few rectangles a row survive to the size of a block for the masks people write, so the
cost follows the mask's boundary and not the square of the length. Blocks that interval arithmetic
cannot decide are settled exactly by asking the mask: first at the corners, then at every element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringflex.masks.block_mask import BlockMask
from ringflex.masks.bounds import ALL, NONE, UNDECIDED, MaskBounds, Rectangles
from ringflex.masks.runs import Array, Runs, counting
from ringflex.masks.trace_cache import traced_mask
from ringflex.masks.traced_mod import TracedMod
from ringflex.modes import outside_inference_mode

_FEW = 512  # rectangles
_ELEMENTS_AT_ONCE = 1 << 20  # of mask evaluated together when blocks are settled exactly


class BlockMaskBuilder:
    """Builds the rows of one mask for any set of query blocks.

    Args:
        mask: the traced mask; its captured tensors as they are now.
        B, H: batch elements and heads; needed (not None) where the mask depends on them.
        q_limit, kv_limit: true lengths of queries and keys, in tokens.
        block_size: tokens per query block and per K/V block.
    """

    def __init__(
        self,
        mask: TracedMod,
        *,
        B: int | None,
        H: int | None,
        q_limit: int,
        kv_limit: int,
        block_size: tuple[int, int],
    ) -> None:
        for name, size, axis in (("b", B, "B"), ("h", H, "H")):
            if name in mask.uses and size is None:
                raise ValueError(
                    f"mask '{mask.name}' depends on {name}: pass {axis}=the number of "
                    f"{'batch elements' if axis == 'B' else 'query heads'}"
                )
        self.mask = mask = mask.frozen()
        self.B = B if B is not None and "b" in mask.uses else 1
        self.H = H if H is not None and "h" in mask.uses else 1
        self.q_limit, self.kv_limit = q_limit, kv_limit
        self.block_size = block_size
        self.bounds = MaskBounds(mask)
        self.cpu_mask = mask.to(torch.device("cpu"))
        self._check_reads()

    def build(self, q_starts: Array, kv_blocks: int, *, q_len: int, kv_len: int) -> BlockMask:
        """The mask of some query blocks against K/V blocks `0 .. kv_blocks - 1`.

        Args:
            q_starts: global positions of the query blocks, ascending, int64.
            kv_blocks: number of K/V blocks in hand; those beyond `kv_limit` are padding.
            q_len, kv_len: tokens in hand.
        """
        bq, bk = self.block_size
        pieces = self._subdivide(q_starts, min(kv_blocks, -(-self.kv_limit // bk)))
        full, partial = self._runs(q_starts, *pieces)
        return BlockMask(
            mask=self.mask,
            B=self.B,
            H=self.H,
            block_size=self.block_size,
            q_len=q_len,
            kv_len=kv_len,
            q_starts=q_starts,
            kv_starts=np.arange(kv_blocks, dtype=np.int64)[None, :] * bk,
            q_limit=self.q_limit,
            kv_limit=self.kv_limit,
            full=full,
            partial=partial,
        )

    def _check_reads(self) -> None:
        """Asks the mask at the corners of everything: a captured tensor that is too short shows."""
        sizes = (self.B, self.H, self.q_limit, self.kv_limit)
        ends = [torch.tensor([0, size - 1], device="cpu") for size in sizes]
        self._ask(*torch.meshgrid(*ends, indexing="ij"))

    def _ask(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        try:
            return self.cpu_mask.evaluate(b, h, q_idx, kv_idx)
        except IndexError as error:
            shapes = ", ".join(str(tuple(c.shape)) for c in self.mask.captures)
            raise ValueError(
                f"mask '{self.mask.name}' reads beyond a captured tensor of shape {shapes} for "
                f"(B, H, q_len, kv_len) = {(self.B, self.H, self.q_limit, self.kv_limit)}: {error}"
            ) from None

    def _rectangles(self, rect: Array, q_starts: Array) -> Rectangles:
        """`rect` int64 `[5, n]`: group, row range, column range (half open) -> element bounds."""
        bq, bk = self.block_size
        group, r0, r1, c0, c1 = rect
        q_hi = np.minimum(q_starts[r1 - 1] + bq, self.q_limit) - 1
        kv_hi = np.minimum(c1 * bk, self.kv_limit) - 1
        return Rectangles(group // self.H, group % self.H, q_starts[r0], q_hi, c0 * bk, kv_hi)

    def _subdivide(self, q_starts: Array, columns: int) -> tuple[Array, Array]:
        """Rectangles `[5, n]` of blocks that are full, and blocks `[5, m]` that are partial."""
        rows = int(np.searchsorted(q_starts, self.q_limit))  # the rest is padding
        groups = self.B * self.H
        rect = np.empty((5, groups if rows and columns else 0), dtype=np.int64)
        rect[:] = np.array([0, 0, rows, 0, columns])[:, None]
        rect[0] = np.arange(rect.shape[1])
        full, undecided = [rect[:, :0]], [rect[:, :0]]
        while rect.shape[1]:
            elements = self._rectangles(rect, q_starts)
            code = self.bounds.classify(elements)
            full.append(rect[:, code == ALL])
            left = code == UNDECIDED
            rect = rect[:, left]
            rect, single = self._split(rect, q_starts)
            undecided.append(single)
            for _ in range(3):
                if rect.shape[1] < _FEW:  # classifying takes as long for more
                    rect = np.concatenate(self._split(rect, q_starts), axis=1)
        whole, partial = self._settle(np.concatenate(undecided, axis=1), q_starts)
        return np.concatenate([*full, whole], axis=1), partial

    def _split(self, rect: Array, q_starts: Array) -> tuple[Array, Array]:
        """The longer side of each rectangle, in tokens, cut in two, or both; and single blocks."""
        elements = self._rectangles(rect, q_starts)
        q_extent = elements.q_hi - elements.q_lo + 1
        kv_extent = elements.kv_hi - elements.kv_lo + 1
        many_rows, many_columns = rect[2] - rect[1] > 1, rect[4] - rect[3] > 1
        by_row = many_rows & ((2 * q_extent > kv_extent) | ~many_columns)
        by_column = many_columns & ((2 * kv_extent > q_extent) | ~many_rows)
        split = by_row | by_column
        halves, order = _halve(rect[:, split], by_row[split], 1)
        halves, _ = _halve(halves, by_column[split][order], 3)
        return halves, rect[:, ~split]

    def _settle(self, rect: Array, q_starts: Array) -> tuple[Array, Array]:
        """Asks the mask itself about single blocks: those that are full, those that are partial."""
        elements = self._rectangles(rect, q_starts)
        corners = self._seen(
            elements,
            np.stack([elements.q_lo, elements.q_hi], axis=1),
            np.stack([elements.kv_lo, elements.kv_hi], axis=1),
        ).reshape(-1, 4)
        code = np.full(rect.shape[1], UNDECIDED, dtype=np.int8)
        alike = np.flatnonzero(corners.all(1) | ~corners.any(1))
        bq, bk = self.block_size
        at_once = max(1, _ELEMENTS_AT_ONCE // (bq * bk))
        for first in range(0, alike.size, at_once):
            some = alike[first : first + at_once]
            block = Rectangles(*(x[some] for x in elements))
            seen = self._seen(
                block,
                np.minimum(block.q_lo[:, None] + np.arange(bq), block.q_hi[:, None]),
                np.minimum(block.kv_lo[:, None] + np.arange(bk), block.kv_hi[:, None]),
            ).reshape(some.size, -1)
            code[some] = np.where(seen.all(1), ALL, np.where(seen.any(1), UNDECIDED, NONE))
        return rect[:, code == ALL], rect[:, code == UNDECIDED]

    def _seen(self, at: Rectangles, q_idx: Array, kv_idx: Array) -> Array:
        """The mask at `q_idx [n, i]` x `kv_idx [n, j]`: bool `[n, i, j]`."""
        seen = self._ask(
            torch.from_numpy(at.b)[:, None, None],
            torch.from_numpy(at.h)[:, None, None],
            torch.from_numpy(q_idx)[:, :, None],
            torch.from_numpy(kv_idx)[:, None, :],
        )
        return seen.expand(q_idx.shape[0], q_idx.shape[1], kv_idx.shape[1]).numpy()

    def _runs(self, q_starts: Array, full: Array, partial: Array) -> tuple[Runs, Runs]:
        """CSR runs; blocks that reach beyond the true lengths count as partial."""
        bq, bk = self.block_size
        group, r0, r1, c0, c1 = full
        height = r1 - r0
        inner = counting(height)
        row, start, end = (
            np.repeat(r0, height) + inner,
            np.repeat(c0, height),
            np.repeat(c1, height),
        )
        key = np.repeat(group, height) * q_starts.size + row
        ragged_row = q_starts[row] + bq > self.q_limit
        ragged_column = np.int64(self.kv_limit // bk)  # the block that padding begins in
        cut = np.where(ragged_row, start, np.maximum(start, np.minimum(end, ragged_column)))
        rows = self.B * self.H * q_starts.size
        return (
            Runs.from_pieces(key, start, cut, rows),
            Runs.from_pieces(
                np.concatenate([key, partial[0] * q_starts.size + partial[1]]),
                np.concatenate([cut, partial[3]]),
                np.concatenate([end, partial[4]]),
                rows,
            ),
        )


def _halve(rect: Array, which: Array, lower: int) -> tuple[Array, Array]:
    """Cuts the range `rect[lower : lower + 2]` of some rectangles in two.

    Returns:
        The rectangles, and for each the index of the one that it came from.
    """
    whole, cut = np.flatnonzero(~which), np.flatnonzero(which)
    order = np.concatenate([whole, cut, cut])
    rect = rect[:, order]
    first, second = slice(whole.size, whole.size + cut.size), slice(whole.size + cut.size, None)
    middle = (rect[lower] + rect[lower + 1]) // 2
    rect[lower + 1, first] = middle[first]
    rect[lower, second] = middle[second]
    return rect, order


@outside_inference_mode
def create_block_mask(
    mask_mod: Callable[..., Tensor],
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
) -> BlockMask:
    """The block mask of `mask_mod` for one device; FlexAttention's signature, runs as storage.

    >>> bm = create_block_mask(causal() & sliding_window(4096), None, None, 65536, 65536)

    Args:
        mask_mod: `mask_mod(b, h, q_idx, kv_idx) -> bool` on 0-dim integer tensors.
        B, H: batch elements and query heads; None (or any number) if the mask does not depend
            on them.
        Q_LEN, KV_LEN: tokens; any length.
        device: accepted for FlexAttention's sake; the mask is built on the host, and kernels
            copy what they need to the device of their inputs.
        BLOCK_SIZE: tokens per block, one number or (queries, keys).

    Raises:
        TypeError, ValueError: the mask cannot be traced (the message shows how to write it), or
            a size is not positive, or the mask depends on `b` or `h` and the size is missing.
    """
    block_size = BLOCK_SIZE if isinstance(BLOCK_SIZE, tuple) else (BLOCK_SIZE, BLOCK_SIZE)
    if len(block_size) != 2:
        raise ValueError(f"BLOCK_SIZE must be an int or (queries, keys), got {BLOCK_SIZE!r}")
    sizes = [("B", B), ("H", H), ("Q_LEN", Q_LEN), ("KV_LEN", KV_LEN)]
    for name, value in (*sizes, ("BLOCK_SIZE", block_size[0]), ("BLOCK_SIZE", block_size[1])):
        if value is None and name in "BH":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    builder = BlockMaskBuilder(
        traced_mask(mask_mod), B=B, H=H, q_limit=Q_LEN, kv_limit=KV_LEN, block_size=block_size
    )
    bq, bk = block_size
    q_starts = np.arange(-(-Q_LEN // bq), dtype=np.int64) * bq
    return builder.build(q_starts, -(-KV_LEN // bk), q_len=Q_LEN, kv_len=KV_LEN)
