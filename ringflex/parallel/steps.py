"""The steps of a plan, and how one rank's are made. Pure: no process group, no tensors.

A step is data: which K/V blocks arrive and from whom, which to send to whom, the block mask of the
local queries against what arrived, and where the gradients of those blocks go home to. One loop
runs the steps of all strategies (see schedule.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ringflex.kernels.stages import Stage
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.runs import Array
from ringflex.parallel.needs import Reads


@dataclass(frozen=True, eq=False)
class Transfer:
    """Blocks to or from one peer.

    Attributes:
        peer: rank within the group.
        blocks: for each batch element that the mask distinguishes, the positions of the blocks
            in the buffer that they leave or enter, ascending.
        of: the step whose buffer, or whose gradients, that is; 0: the local K/V, or theirs.
        cache: what moving them needs on the device.
    """

    peer: int
    blocks: tuple[Array, ...]
    of: int = 0
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """Blocks, summed over the batch elements that the mask distinguishes."""
        return sum(b.size for b in self.blocks)


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One step of one rank. The last may have nothing but gradients to exchange.

    Attributes:
        receives: K/V that arrives, by peer, in this step's buffer.
        sends: K/V that leaves meanwhile, of the local K/V or of an earlier step's buffer.
        mask: local queries against this step's buffer; None if no query sees any of it.
        stage: which queries begin and end with this step; None if it is the only one with a mask.
        width: blocks of this step's buffer (per batch element).
        returns: dK/dV that goes home after the backward of this step, this step's or an earlier
            one's.
        collects: dK/dV that comes in meanwhile, and is added to the local one or to an earlier
            step's, which has not left yet.
    """

    receives: tuple[Transfer, ...] = ()
    sends: tuple[Transfer, ...] = ()
    mask: BlockMask | None = None
    stage: Stage | None = None
    width: int = 0
    returns: tuple[Transfer, ...] = ()
    collects: tuple[Transfer, ...] = ()


Held = list[Array]  # per batch element that the mask distinguishes: global blocks, ascending


class Moved(NamedTuple):
    """Blocks that go to a rank or come from it, and the step in whose buffer they are."""

    peer: int
    blocks: Held
    of: int = 0


class StepMaker:
    """Makes the steps of one rank, in order.

    Args:
        rows: block mask of the rank's queries; None: the steps have no masks.

    Attributes:
        seen, shown: what this rank reads of others, by owner, and others of it, by reader.
        nothing: no blocks.
        held: what the buffer of each step holds.
        steps: those made; the first is the local one.
    """

    def __init__(self, rank: int, reads: Reads, rows: BlockMask | None) -> None:
        self.rank, self.reads, self.rows = rank, reads, rows
        self.world, self.groups = reads.layout.world_size, reads.needs.groups
        self.seen, self.shown = reads.by(rank), reads.of(rank)
        self.nothing: Held = [_NOTHING] * self.groups
        local: Held = [reads.layout.blocks_of(rank)] * self.groups
        self.held = [local]
        self.steps = [Step(mask=self._rows_on(local), width=local[0].size)]

    def add(
        self,
        comes: Sequence[Moved],
        leaves: Sequence[Moved],
        returned: Sequence[Moved],
        collected: Sequence[Moved],
    ) -> None:
        """Adds a step that receives and sends K/V, and returns and collects gradients; what comes
        is `of` this step."""
        parts = zip(*(moved.blocks for moved in comes), strict=True)
        arriving = [np.sort(np.concatenate(part)) for part in parts] or self.nothing
        self.held.append(arriving)
        step = Step(
            receives=self._transfers(comes),
            sends=self._transfers(leaves),
            mask=self._rows_on(arriving),
            width=max(blocks.size for blocks in arriving),
            returns=self._transfers(returned),
            collects=self._transfers(collected),
        )
        self.steps.append(step)

    def between(self, blocks: list[dict[int, Array]], peer: int) -> Held:
        return [of_group.get(peer, _NOTHING) for of_group in blocks]

    def _rows_on(self, held: Held) -> BlockMask | None:
        """The local queries against a buffer that holds some blocks; None if they see nothing."""
        if self.rows is None or not any(blocks.size for blocks in held):
            return None
        mask = self.rows.select_kv(held)
        return mask if mask.visible_blocks else None

    def _transfers(self, moved: Sequence[Moved]) -> tuple[Transfer, ...]:
        """By the positions of blocks in the buffers; none that are empty."""
        made = []
        for peer, chosen, of in moved:
            at = (np.searchsorted(b, c) for c, b in zip(chosen, self.held[of], strict=True))
            made.append(Transfer(peer, tuple(at), of))
        return tuple(t for t in made if t.count)


_NOTHING = np.zeros(0, dtype=np.int64)
