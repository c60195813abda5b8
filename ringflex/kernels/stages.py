"""Where attention over K/V that arrives in steps begins and ends, for each block of queries.

A block of queries that sees nothing of a step is left alone by it; one that saw nothing before
merges with nothing; and one that sees nothing later is done, and its result rounded. So what a step
reads and writes of running results is what its own queries need: with a window or documents, most
blocks of queries begin and end with the local step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringflex.kernels.device_arrays import to_device
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.runs import Array

BEGINS, ENDS, ACTIVE = 1, 2, 4  # bits of a turn
_ALL = BEGINS | ENDS | ACTIVE


@dataclass(frozen=True, eq=False, kw_only=True)
class Stage:
    """One step's turns.

    Attributes:
        turns: of each block of queries, int32 `[mask batch, mask heads, q blocks]`; 0: left alone.
        block_size: queries per block.
        cache: the same on devices.
    """

    turns: Array
    block_size: int
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def merges(self) -> bool:
        """Whether it computes for queries that do not both begin and end with it."""
        if "merges" not in self.cache:
            self.cache["merges"] = bool(((self.turns != 0) & (self.turns != _ALL)).any())
        merges: bool = self.cache["merges"]
        return merges

    @property
    def is_selection(self) -> bool:
        """Whether it merges nothing, and leaves as many queries alone in every batch element and
        head: lists without these are all that a kernel must know of it."""
        if "is selection" not in self.cache:
            counts = (self.turns != 0).sum(axis=2)
            self.cache["is selection"] = not self.merges and bool((counts == counts.max()).all())
        is_selection: bool = self.cache["is selection"]
        return is_selection

    def on(self, device: torch.device) -> Tensor:
        """`turns`, flat, on a device."""
        if device not in self.cache:
            self.cache[device] = to_device(self.turns.reshape(-1), device)
        turns: Tensor = self.cache[device]
        return turns

    def begin(self, x: Tensor, value: Tensor | float) -> None:
        """Sets queries of `x [B, H, q_len, ...]` that begin here."""
        if isinstance(value, Tensor):
            value = value.to(x.dtype)
        x.copy_(torch.where(self._queries(BEGINS, x), value, x))

    def end(self, running: Tensor, final: Tensor) -> None:
        """Copies queries that end here."""
        final.copy_(torch.where(self._queries(ENDS, final), running.to(final.dtype), final))

    def _queries(self, bit: int, like: Tensor) -> Tensor:
        """bool, for each query of `like [B, H, q_len, ...]`."""
        key = bit, like.device
        if key not in self.cache:
            blocks = self.on(like.device).view(self.turns.shape) & bit != 0
            self.cache[key] = blocks.repeat_interleave(self.block_size, dim=2)
        queries: Tensor = self.cache[key][:, :, : like.shape[2]]
        return queries.view(*queries.shape, *[1] * (like.ndim - 3))


def stages_of(masks: Sequence[BlockMask | None]) -> list[Stage | None]:
    """Of each step, from its mask (None: nothing is seen); all None if only one step is."""
    steps = [i for i, mask in enumerate(masks) if mask is not None]
    if len(steps) < 2:
        return [None] * len(masks)
    some = [mask for mask in masks if mask is not None]
    sees = np.stack([_rows_that_see(mask) for mask in some])  # [steps, mask batch, heads, q blocks]
    sees[0] |= ~sees.any(axis=0)  # what sees nothing at all begins and ends with the first
    counts = np.cumsum(sees, axis=0)
    begins, ends = sees & (counts == 1), sees & (counts == counts[-1])
    turns = (BEGINS * begins + ENDS * ends + ACTIVE * sees).astype(np.int32)
    stages: list[Stage | None] = [None] * len(masks)
    for i, mask, turn in zip(steps, some, turns, strict=True):
        stages[i] = Stage(turns=turn, block_size=mask.block_size[0])
    return stages


def _rows_that_see(mask: BlockMask) -> Array:
    sees = np.zeros(mask.B * mask.H * mask.q_blocks, dtype=bool)
    for runs in (mask.full, mask.partial):
        sees[runs.row] = True
    return sees.reshape(mask.B, mask.H, mask.q_blocks)
