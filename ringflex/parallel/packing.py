"""K/V blocks of a step's transfers as messages, and back.

A message holds, for each batch element that the mask distinguishes, the tokens of the chosen
blocks, `[tokens, batch elements, Hkv, D + Dv]`: of each head K, then V. The messages of an exchange
lie one behind the other, so that one launch serves them all. With a mask common to the batch, they
are also the buffer of a step, whose blocks lie in the same order: received in place, and dK/dV
computed in place.
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
        self.parts = self.flat.split(sizes)

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
        """The K/V buffer of a step, `width` blocks long and otherwise shaped like `like`; where
        `fill` says so, the messages themselves.

        Blocks that no message brings are zero (no query sees them, but 0 * NaN would be NaN).
        """
        shapes = [(*x.shape[:2], width * self.block_size, x.shape[3]) for x in like]
        if self.fill(width):
            B, H, tokens, D = shapes[0]
            heads = self.flat.view(tokens, B, H, D + shapes[1][3]).permute(1, 2, 0, 3)
            return Pair(heads[..., :D], heads[..., D:])
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

    def fill(self, width: int) -> bool:
        """Whether they hold a buffer of so many blocks, each where it is in the buffer."""
        if self.groups > 1 or len(self._steps()) != 1:
            return False
        blocks = np.concatenate([t.blocks[0] for t in self.transfers])
        return bool(np.array_equal(blocks, np.arange(width)))

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
        B, H = pair.k.shape[:2]
        dims = [x.shape[3] for x in pair]
        for transfer, message in zip(self.transfers, self.parts, strict=True):
            if transfer.of != of:
                continue
            groups = message.split(
                [
                    c.size * self.block_size * B // self.groups * H * sum(dims)
                    for c in transfer.blocks
                ]
            )
            for number, (chosen, part) in enumerate(zip(transfer.blocks, groups, strict=True)):
                if not chosen.size:
                    continue
                index = to_device(chosen, pair.k.device)
                shape = (chosen.size, self.block_size, B // self.groups, H, sum(dims))
                pieces = part.view(shape).permute(2, 3, 0, 1, 4).split(dims, dim=4)
                for x, piece in zip(pair, pieces, strict=True):
                    blocks = x.unflatten(2, (-1, self.block_size)).chunk(self.groups)[number]
                    yield blocks, index, piece

    def _places(self, of: int, pair: Pair, *, every: bool = False) -> Any:
        """`triton_blocks.Places` of a step's transfers; kept with the first of them.

        every: sums are of all of the tensors' blocks, also where nothing is added.
        """
        B, H, tokens, D = pair.k.shape
        width, heads = tokens // self.block_size, B // self.groups * H
        elements = self.block_size * heads * (D + pair.v.shape[3])
        cache = self.transfers[0].cache
        key = self.transfers[1:], of, every, width, elements, pair.k.device
        if key not in cache:
            from ringflex.kernels.triton_blocks import Places

            rows = _rows(self.transfers, of, elements)
            # By block; of each block, in the order of the transfers.
            rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
            sums = _sums(rows, self.groups, width, every=every)
            assert not (rows[:, 2] % _UNIT).any()
            rows[:, 2] //= _UNIT
            cache[key] = Places(
                *(to_device(x.astype(np.int32), pair.k.device) for x in (rows, sums))
            )
        return cache[key]


def _rows(transfers: Sequence[Transfer], of: int, elements: int) -> Array:
    """`Places.of_blocks` of the transfers of a step, transfer by transfer, places in elements.

    elements: of a block, of all heads of a group of batch elements.
    """
    found, at = [np.zeros((0, 3), dtype=np.int64)], 0
    for transfer in transfers:
        for group, blocks in enumerate(transfer.blocks):
            if transfer.of == of:
                rows = np.empty((blocks.size, 3), dtype=np.int64)
                rows[:, 0], rows[:, 1] = group, blocks
                rows[:, 2] = at + np.arange(blocks.size) * elements
                found.append(rows)
            at += blocks.size * elements
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
