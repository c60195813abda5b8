"""What is kept of captured tensors: integers in few bits, and something that stands for a hash."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_WORDS = 1 << 14  # of 8 bytes, that become one


def narrowest(table: Tensor, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The first of some integer dtypes that holds every value; else the table's own."""
    if not table.numel():
        return table.dtype
    low, high = (int(x) for x in table.aminmax())
    fits = (d for d in dtypes if torch.iinfo(d).min <= low and high <= torch.iinfo(d).max)
    return next(fits, table.dtype)


def fingerprint(data: Tensor, update: Callable[..., object]) -> None:
    """Gives `update`, of a hash, something that stands for `data` (uint8 `[n]`, on the CPU), as
    fast as memory is read.

    Of every 128 KiB, a sum of its words, each times a random odd number, modulo 2^64
    (Dietzfelbinger et al., "A reliable randomized algorithm for the closest-pair problem", 1997):
    what differs by accident has equal sums once in 2^63 times or so. It does not withstand intent.
    """
    whole = data.numel() // (8 * _WORDS) * 8 * _WORDS
    if whole:
        words = data[:whole].view(torch.int64).view(-1, _WORDS)
        update((words @ _weights()).numpy().data)
    update(data[whole:].numpy().data)


@functools.cache
def _weights() -> Tensor:
    random = np.random.Generator(np.random.PCG64(0))
    words = random.integers(0, 2**64, _WORDS, dtype=np.uint64) | np.uint64(1)
    return torch.from_numpy(words.view(np.int64))
