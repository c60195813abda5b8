"""K/V blocks of a step's transfers as messages, and back.

A message holds K, then V: for each batch element that the mask distinguishes, the chosen blocks
`[batch elements, Hkv, blocks, block_size, D]`. The messages of an exchange lie one behind the
other, so that one launch serves them all. With a mask common to the batch, a message that fills a
whole buffer is that buffer, and is received in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringflex.kernels.device_arrays import to_device
from ringflex.masks.runs import Array
from ringflex.parallel.steps import Transfer

_UNIT = 16  # elements; as `triton_blocks.UNIT`


class Pair(NamedTuple):
    """K and V (or dK and dV) of some blocks: `[B, Hkv, tokens, D]` and `[B, Hkv, tokens, Dv]`."""

    k: Tensor
    v: Tensor


class Messages:
    """One for each of some transfers, empty at first.

    Args:
        like: tensors of this batch, these heads and head dims; any number of tokens.
        dtype: of the messages; by default that of `like`.

    Attributes:
        parts: the messages, each contiguous.
    """

    def __init__(
        self,
        transfers: Sequence[Transfer],
        like: Pair,
        block_size: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.transfers, self.block_size = tuple(transfers), block_size
        self.groups = len(transfers[0].blocks) if transfers else 1
        per_block = sum(x.shape[0] * x.shape[1] * block_size * x.shape[3] for x in like)
        sizes = [t.count * per_block // self.groups for t in transfers]
        self.flat = like.k.new_empty(sum(sizes), dtype=dtype)
        self.parts = self.flat.split_with_sizes(sizes)

    @property
    def to_peers(self) -> list[tuple[int, Tensor]]:
        """Each message, and the rank that it goes to or comes from."""
        return [(t.peer, part) for t, part in zip(self.transfers, self.parts, strict=True)]

    def pack(self, sources: Mapping[int, Pair]) -> None:
        """Fills them with the blocks of tensors, by the step that a transfer is of."""
        for of in self._steps():
            source = sources[of]
            if _in_triton(source):
                from ringflex.kernels.triton_blocks import move_blocks  # a CPU may have none

                move_blocks(
                    *source, self.flat, self._places(of, source), self.groups, self.block_size,
                    into=False,
                )  # fmt: skip
                continue
            for blocks, index, piece in self._pieces(of, source):
                piece.copy_(blocks.index_select(2, index))

    def unpack(self, like: Pair, width: int) -> Pair:
        """The K/V buffer of a step, `width` blocks long and otherwise shaped like `like`; where one
        message fills it, that message.

        Blocks that no message brings are zero (no query sees them, but 0 * NaN would be NaN).
        """
        shapes = [(*x.shape[:2], width * self.block_size, x.shape[3]) for x in like]
        if self.is_buffer:
            k_size = torch.Size(shapes[0]).numel()
            return Pair(self.flat[:k_size].view(shapes[0]), self.flat[k_size:].view(shapes[1]))
        full = sum(t.count for t in self.transfers) == width * self.groups
        make = torch.empty if full else torch.zeros
        buffer = Pair(*(make(s, dtype=self.flat.dtype, device=self.flat.device) for s in shapes))
        for of in self._steps():
            if _in_triton(buffer):
                from ringflex.kernels.triton_blocks import move_blocks

                places = self._places(of, buffer)
                move_blocks(*buffer, self.flat, places, self.groups, self.block_size, into=True)
                continue
            for blocks, index, piece in self._pieces(of, buffer):
                blocks.index_copy_(2, index, piece)
        return buffer

    @property
    def is_buffer(self) -> bool:
        """Whether there is one message, of a mask common to the batch."""
        return len(self.transfers) == self.groups == 1

    def add_to(self, targets: Mapping[int, Pair]) -> None:
        """Adds their blocks to tensors, by the step that a transfer is of, one after the other;
        where there is none of a step, nothing."""
        for of in self._steps():
            target = targets.get(of)
            if target is None:
                continue
            if _in_triton(target):
                self._sum(of, target, target)
                continue
            for blocks, index, piece in self._pieces(of, target):
                blocks.index_add_(2, index, piece.to(blocks.dtype))

    def added_to(self, pair: Pair, dtype: torch.dtype) -> Pair:
        """`pair` with all of their blocks added, in `dtype`; `pair` itself may change."""
        if self.transfers and _in_triton(pair):
            total = Pair(*(torch.empty(x.shape, dtype=dtype, device=x.device) for x in pair))
            self._sum(0, pair, total)
            return total
        self.add_to({0: pair})
        return Pair(*(x.to(dtype) for x in pair))

    def _steps(self) -> list[int]:
        return sorted({t.of for t in self.transfers})

    def _sum(self, of: int, pair: Pair, total: Pair) -> None:
        from ringflex.kernels.triton_blocks import sum_blocks

        places = self._places(of, pair, every=total is not pair)
        sum_blocks(*pair, *total, self.flat, places, self.groups, self.block_size)

    def _pieces(self, of: int, pair: Pair) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per transfer of a step, tensor and batch element that the mask distinguishes: the
        tensor's blocks (a view `[b, Hkv, blocks, block_size, D]`), which of them the message
        holds, and where (a view)."""
        for transfer, message in zip(self.transfers, self.parts, strict=True):
            if transfer.of != of:
                continue
            at = 0
            for x in pair:
                groups = x.unflatten(2, (-1, self.block_size)).chunk(self.groups)
                for blocks, chosen in zip(groups, transfer.blocks, strict=True):
                    shape = (*blocks.shape[:2], chosen.size, *blocks.shape[3:])
                    size = torch.Size(shape).numel()
                    if size:
                        index = to_device(chosen, x.device)
                        yield blocks, index, message[at : at + size].view(shape)
                    at += size

    def _places(self, of: int, pair: Pair, *, every: bool = False) -> Any:
        """`triton_blocks.Places` of a step's transfers; kept with the first of them.

        every: sums are of all of the tensors' blocks, also where nothing is added.
        """
        B, H, tokens, D = pair.k.shape
        width, heads = tokens // self.block_size, B // self.groups * H
        elements = self.block_size * D, self.block_size * pair.v.shape[3]
        cache = self.transfers[0].cache
        key = self.transfers[1:], of, every, width, heads, elements, pair.k.device
        if key not in cache:
            from ringflex.kernels.triton_blocks import Places

            rows = _rows(self.transfers, of, heads, elements)
            # By block; of each block, in the order of the transfers.
            rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
            sums = _sums(rows, self.groups, width, every=every)
            assert not (rows[:, 3:] % _UNIT).any()
            rows[:, 3:] //= _UNIT
            cache[key] = Places(
                *(to_device(x.astype(np.int32), pair.k.device) for x in (rows, sums))
            )
        return cache[key]


def _rows(transfers: Sequence[Transfer], of: int, heads: int, elements: tuple[int, int]) -> Array:
    """`Places.of_blocks` of the transfers of a step, transfer by transfer, places in elements.

    heads: of all batch elements of a group. elements: of one head's block, of K and of V.
    """
    found, at = [np.zeros((0, 5), dtype=np.int64)], 0
    for transfer in transfers:
        start = np.array([at, at + transfer.count * heads * elements[0]])
        for group, blocks in enumerate(transfer.blocks):
            if transfer.of == of:
                rows = np.empty((blocks.size, 5), dtype=np.int64)
                rows[:, 0], rows[:, 1], rows[:, 2] = group, blocks, blocks.size
                rows[:, 3:] = start + np.outer(np.arange(blocks.size), elements)
                found.append(rows)
            start += blocks.size * heads * np.array(elements)
        at += transfer.count * heads * sum(elements)
    return np.concatenate(found)


def _sums(rows: Array, groups: int, width: int, *, every: bool) -> Array:
    """`Places.sums` for rows that are sorted by block: of all `width` blocks of each group, or of
    those that something is added to."""
    block_of_row = rows[:, 0] * width + rows[:, 1]
    blocks = np.arange(groups * width) if every else np.unique(block_of_row)
    first, end = (np.searchsorted(block_of_row, blocks, side) for side in ("left", "right"))
    return np.stack([blocks // width, blocks % width, first, end], axis=1)


def _in_triton(pair: Pair) -> bool:
    return pair.k.device.type == "cuda" and all(x.stride(3) == 1 for x in pair)
