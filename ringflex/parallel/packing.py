"""K/V blocks of one transfer as one message, and back.

A message holds K, then V: for each batch element that the mask distinguishes, the chosen blocks
`[batch elements, Hkv, blocks, block_size, D]`. With a mask common to the batch, a message that fills
a whole buffer is that buffer, and is received in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ringflex.parallel.steps import Transfer


def pack(transfer: Transfer, k: Tensor, v: Tensor, block_size: int) -> Tensor:
    """One contiguous message of the transfer's blocks of `k [B, Hkv, tokens, D]` and `v`."""
    message = new_message(transfer, k, v, block_size)
    for x, part in zip((k, v), _parts(transfer, message, (k, v), block_size), strict=True):
        for index, group, piece in zip(
            _indices(transfer, x), _groups(transfer, x, block_size), part, strict=True
        ):
            torch.index_select(group, 2, index, out=piece)
    return message


def new_message(transfer: Transfer, k: Tensor, v: Tensor, block_size: int) -> Tensor:
    """An empty message for the transfer's blocks of tensors like `k` and `v`."""
    per_block = sum(x.shape[1] * x.shape[3] * x.shape[0] for x in (k, v)) * block_size
    return k.new_empty(transfer.count * per_block // len(transfer.blocks))


def unpack(
    transfers: Sequence[Transfer], messages: Sequence[Tensor], like: tuple[Tensor, Tensor],
    width: int, block_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """K and V buffers of `width` blocks, shaped otherwise like `like`, from all messages of a step.

    Blocks that no message brings are zero (no query sees them, but 0 * NaN would be NaN).
    """
    if len(transfers) == 1 and len(transfers[0].blocks) == 1:
        k, v = _parts(transfers[0], messages[0], like, block_size)
        return k[0].flatten(2, 3), v[0].flatten(2, 3)
    k, v = (x.new_zeros(*x.shape[:2], width * block_size, x.shape[3]) for x in like)
    for transfer, message in zip(transfers, messages, strict=True):
        for x, part in zip((k, v), _parts(transfer, message, like, block_size), strict=True):
            indices = _indices(transfer, x)
            for index, group, piece in zip(
                indices, _groups(transfer, x, block_size), part, strict=True
            ):
                group.index_copy_(2, index, piece)
    return k, v


def add(transfer: Transfer, message: Tensor, k: Tensor, v: Tensor, block_size: int) -> None:
    """Adds a message's blocks into `k` and `v`."""
    for x, part in zip((k, v), _parts(transfer, message, (k, v), block_size), strict=True):
        for index, group, piece in zip(
            _indices(transfer, x), _groups(transfer, x, block_size), part, strict=True
        ):
            group.index_add_(2, index, piece)


def _groups(transfer: Transfer, x: Tensor, block_size: int) -> tuple[Tensor, ...]:
    """Views `[batch elements, Hkv, blocks, block_size, D]`, one per entry of `transfer.blocks`."""
    return x.unflatten(2, (-1, block_size)).chunk(len(transfer.blocks))


def _indices(transfer: Transfer, x: Tensor) -> list[Tensor]:
    return [torch.from_numpy(blocks).to(x.device) for blocks in transfer.blocks]


def _parts(
    transfer: Transfer, message: Tensor, like: tuple[Tensor, Tensor], block_size: int
) -> Iterator[list[Tensor]]:
    """The K pieces, then the V pieces of a message, as views."""
    at = 0
    for x in like:
        pieces = []
        batch = x.shape[0] // len(transfer.blocks)
        for blocks in transfer.blocks:
            shape = (batch, x.shape[1], blocks.size, block_size, x.shape[3])
            size = batch * x.shape[1] * blocks.size * block_size * x.shape[3]
            pieces.append(message[at : at + size].view(shape))
            at += size
        yield pieces
