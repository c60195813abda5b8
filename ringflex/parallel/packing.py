"""K/V blocks of one transfer as one message, and back.

A message holds K, then V: for each batch element that the mask distinguishes, the chosen blocks
`[batch elements, Hkv, blocks, block_size, D]`. With a mask common to the batch, a message that
fills a whole buffer is that buffer, and is received in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ringflex.kernels.device_arrays import to_device
from ringflex.parallel.steps import Transfer


class Pair(NamedTuple):
    """K and V (or dK and dV) of some blocks: `[B, Hkv, tokens, D]` and `[B, Hkv, tokens, Dv]`."""

    k: Tensor
    v: Tensor


def pack(transfer: Transfer, pair: Pair, message: Tensor, block_size: int) -> None:
    """Fills a message with the transfer's blocks; in the message's dtype."""
    for blocks, index, piece in _pieces(transfer, message, pair, block_size):
        if isinstance(index, slice):
            piece.copy_(blocks[:, :, index])
        elif _in_triton(blocks):
            _move(blocks, index, piece, into=False, add=False)
        else:
            piece.copy_(blocks.index_select(2, index))


def new_message(
    transfer: Transfer, like: Pair, block_size: int, dtype: torch.dtype | None = None
) -> Tensor:
    """An empty message for the transfer's blocks of tensors like `like`."""
    per_block = sum(x.shape[0] * x.shape[1] * block_size * x.shape[3] for x in like)
    return like.k.new_empty(transfer.count * per_block // len(transfer.blocks), dtype=dtype)


def unpack(
    transfers: Sequence[Transfer],
    messages: Sequence[Tensor],
    like: Pair,
    width: int,
    block_size: int,
) -> Pair:
    """The K/V buffer of a step, `width` blocks long and otherwise shaped like `like`.

    Blocks that no message brings are zero (no query sees them, but 0 * NaN would be NaN).
    """
    if len(transfers) == 1 and len(transfers[0].blocks) == 1:
        shapes = [(*x.shape[:2], width * block_size, x.shape[3]) for x in like]
        k_size = like.k.shape[:2].numel() * width * block_size * like.k.shape[3]
        message = messages[0]
        return Pair(message[:k_size].view(shapes[0]), message[k_size:].view(shapes[1]))
    groups = max((len(t.blocks) for t in transfers), default=1)
    full = sum(t.count for t in transfers) == width * groups
    make = torch.empty if full else torch.zeros
    shapes = [(*x.shape[:2], width * block_size, x.shape[3]) for x in like]
    buffer = Pair(*(make(s, dtype=like.k.dtype, device=like.k.device) for s in shapes))
    for transfer, message in zip(transfers, messages, strict=True):
        _place(transfer, message, buffer, block_size, add=False)
    return buffer


def add(transfer: Transfer, message: Tensor, into: Pair, block_size: int) -> None:
    """Adds a message's blocks into `into`, in the latter's dtype."""
    _place(transfer, message, into, block_size, add=True)


def add_all(
    transfers: Sequence[Transfer],
    messages: Sequence[Tensor],
    pair: Pair,
    block_size: int,
    dtype: torch.dtype,
) -> Pair:
    """`pair` with the messages' blocks added, in `dtype`; `pair` itself may change."""
    one = len(transfers) == 1 and len(transfers[0].blocks) == 1
    pieces = list(_pieces(transfers[0], messages[0], pair, block_size)) if one else []
    if not pieces or not all(isinstance(index, slice) for _, index, _ in pieces):
        for transfer, message in zip(transfers, messages, strict=True):
            add(transfer, message, pair, block_size)
        return Pair(*(x.to(dtype) for x in pair))
    result = Pair(*(torch.empty(x.shape, dtype=dtype, device=x.device) for x in pair))
    for (blocks, index, piece), x in zip(pieces, result, strict=True):  # added and cast at once
        assert isinstance(index, slice)
        target = x.unflatten(2, (-1, block_size))
        torch.add(blocks[:, :, index], piece, out=target[:, :, index])
        for rest in (slice(0, index.start), slice(index.stop, None)):
            target[:, :, rest].copy_(blocks[:, :, rest])
    return result


def _place(transfer: Transfer, message: Tensor, pair: Pair, block_size: int, *, add: bool) -> None:
    for blocks, index, piece in _pieces(transfer, message, pair, block_size):
        if isinstance(index, slice):
            target = blocks[:, :, index]
            target.add_(piece) if add else target.copy_(piece)
        elif _in_triton(blocks):
            _move(blocks, index, piece, into=True, add=add)
        elif add:
            blocks.index_add_(2, index, piece.to(blocks.dtype))
        else:
            blocks.index_copy_(2, index, piece)


def _pieces(
    transfer: Transfer, message: Tensor, pair: Pair, block_size: int
) -> Iterator[tuple[Tensor, Tensor | slice, Tensor]]:
    """Per tensor and batch element that the mask distinguishes: the tensor's blocks (a view
    `[b, Hkv, blocks, block_size, D]`), which of them the message holds, and where (a view)."""
    at = 0
    for x in pair:
        groups = x.unflatten(2, (-1, block_size)).chunk(len(transfer.blocks))
        for number, (blocks, chosen) in enumerate(zip(groups, transfer.blocks, strict=True)):
            shape = (*blocks.shape[:2], chosen.size, *blocks.shape[3:])
            size = torch.Size(shape).numel()
            if size:
                yield (
                    blocks,
                    _index(transfer, number, x.device),
                    message[at : at + size].view(shape),
                )
            at += size


def _index(transfer: Transfer, group: int, device: torch.device) -> Tensor | slice:
    """Which blocks a transfer moves; a slice if they follow one another."""
    if (group, device) not in transfer.cache:
        chosen = transfer.blocks[group]
        first, last = int(chosen[0]), int(chosen[-1])
        following = last - first + 1 == chosen.size  # they ascend
        transfer.cache[group, device] = (
            slice(first, last + 1) if following else to_device(chosen, device)
        )
    index: Tensor | slice = transfer.cache[group, device]
    return index


def _in_triton(blocks: Tensor) -> bool:
    return blocks.device.type == "cuda" and blocks.stride(4) == 1


def _move(blocks: Tensor, index: Tensor, piece: Tensor, *, into: bool, add: bool) -> None:
    from ringflex.kernels.triton_blocks import move_blocks  # a CPU may have no Triton

    move_blocks(blocks, index, piece, into=into, add=add)
