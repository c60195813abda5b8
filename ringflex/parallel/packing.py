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

from ringflex.parallel.steps import Transfer


class Pair(NamedTuple):
    """K and V (or dK and dV) of some blocks: `[B, Hkv, tokens, D]` and `[B, Hkv, tokens, Dv]`."""

    k: Tensor
    v: Tensor


def pack(transfer: Transfer, pair: Pair, block_size: int) -> Tensor:
    """One contiguous message of the transfer's blocks."""
    message = new_message(transfer, pair, block_size)
    for blocks, index, piece in _pieces(transfer, message, pair, block_size):
        torch.index_select(blocks, 2, index, out=piece)
    return message


def new_message(transfer: Transfer, like: Pair, block_size: int) -> Tensor:
    """An empty message for the transfer's blocks of tensors like `like`."""
    per_block = sum(x.shape[0] * x.shape[1] * block_size * x.shape[3] for x in like)
    return like.k.new_empty(transfer.count * per_block // len(transfer.blocks))


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
    buffer = Pair(*(x.new_zeros(*x.shape[:2], width * block_size, x.shape[3]) for x in like))
    for transfer, message in zip(transfers, messages, strict=True):
        for blocks, index, piece in _pieces(transfer, message, buffer, block_size):
            blocks.index_copy_(2, index, piece)
    return buffer


def add(transfer: Transfer, message: Tensor, into: Pair, block_size: int) -> None:
    """Adds a message's blocks into `into`."""
    for blocks, index, piece in _pieces(transfer, message, into, block_size):
        blocks.index_add_(2, index, piece)


def _pieces(
    transfer: Transfer, message: Tensor, pair: Pair, block_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per tensor and batch element that the mask distinguishes: the tensor's blocks (a view
    `[b, Hkv, blocks, block_size, D]`), which of them the message holds, and where (a view)."""
    at = 0
    for x in pair:
        groups = x.unflatten(2, (-1, block_size)).chunk(len(transfer.blocks))
        for blocks, chosen in zip(groups, transfer.blocks, strict=True):
            shape = (*blocks.shape[:2], chosen.size, *blocks.shape[3:])
            size = torch.Size(shape).numel()
            index = torch.from_numpy(chosen).to(x.device)
            yield blocks, index, message[at : at + size].view(shape)
            at += size
