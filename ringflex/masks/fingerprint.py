"""Many megabytes in a few, for a hash: as fast as memory is read."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_WORDS = 1 << 14  # of 8 bytes, that become one


def fingerprint(data: Tensor, update: Callable[..., object]) -> None:
    """Gives `update` something that stands for `data` (uint8 `[n]`, on the CPU).

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
