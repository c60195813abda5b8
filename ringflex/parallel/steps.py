"""Mask x layout x strategy -> the steps of one rank. Pure: no process group, no tensors.

A step is data: which K/V blocks arrive and from whom, which to send to whom, the block mask of the
local queries against what arrived, and where the gradients of those blocks go home to. The three
strategies differ only in these lists; one loop runs them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ringflex.kernels.stages import Stage, stages_of
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.runs import Array
from ringflex.parallel.layout import Layout


@dataclass(frozen=True, eq=False)
class Transfer:
    """Blocks to or from one peer.

    Attributes:
        peer: rank within the group.
        blocks: for each batch element that the mask distinguishes, the positions of the blocks
            in the buffer they leave (send) or enter (receive), ascending.
        cache: what moving them needs on the device.
    """

    peer: int
    blocks: tuple[Array, ...]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """Blocks, summed over the batch elements that the mask distinguishes."""
        return sum(b.size for b in self.blocks)


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One step of one rank.

    Attributes:
        receives: K/V that arrives, by peer; positions in this step's buffer.
        sends: K/V that leaves; positions in the local K/V, or in the previous step's buffer if
            `passes_on` (ring).
        passes_on: whether `sends` come from the previous step's buffer.
        mask: local queries against this step's buffer; None if no query sees any of it.
        stage: which queries begin and end with this step; None if it is the only one with a mask.
        width: blocks of this step's buffer (per batch element).
        returns: dK/dV that goes home after the backward of this step; positions in the buffer.
        collects: dK/dV that comes home; positions in the local K/V.
    """

    receives: tuple[Transfer, ...] = ()
    sends: tuple[Transfer, ...] = ()
    passes_on: bool = False
    mask: BlockMask | None = None
    stage: Stage | None = None
    width: int = 0
    returns: tuple[Transfer, ...] = ()
    collects: tuple[Transfer, ...] = ()


def build_steps(
    strategy: str, rank: int, layout: Layout, needed: Array, rows: BlockMask
) -> tuple[Step, ...]:
    """The steps of `rank`; the first is the local one.

    Args:
        strategy: "ring", "direct" or "all_gather".
        needed: bool `[W, MB, blocks]`: what each rank needs, per batch element that the mask
            distinguishes. Needs of a rank on its own blocks do not matter.
        rows: block mask of this rank's queries against the whole sequence.
    """
    return _Planner(rank, layout, needed, rows).steps(strategy)


class _Planner:
    def __init__(
        self, rank: int, layout: Layout, needed: Array, rows: BlockMask | None = None
    ) -> None:
        self.rank, self.layout, self.needed, self.rows = rank, layout, needed, rows
        self.world = layout.world_size
        self.owned = layout.owner[None, :] == np.arange(self.world)[:, None]  # [W, blocks]
        self.local = np.cumsum(self.owned[rank]) - 1  # global block -> position in local K/V

    def steps(self, strategy: str) -> tuple[Step, ...]:
        mine = np.broadcast_to(self.owned[self.rank], self.needed.shape[1:])
        steps = [Step(mask=self._mask(mine), width=int(self.owned[self.rank].sum()))]
        held = mine  # what the previous step's buffer holds: bool [MB, blocks]
        for distances in _schedule(strategy, self.reads()):
            step, held = self._step(strategy, distances, held)
            steps.append(step)
        stages = stages_of([step.mask for step in steps])
        return tuple(replace(step, stage=s) for step, s in zip(steps, stages, strict=True))

    def reads(self) -> Array:
        """bool `[W, W]`: whether the rank at `distance` after `owner` needs a block of it."""
        needs: Array = np.asarray(self.needed.any(axis=1))  # [W, blocks]
        at = np.zeros((self.world, self.world), dtype=bool)
        for reader in range(self.world):
            owners = self.layout.owner[needs[reader]]
            at[owners, (reader - owners) % self.world] = True
        return at

    def _step(self, strategy: str, distances: list[int], held: Array) -> tuple[Step, Array]:
        """The step that serves some distances, and what its buffer holds."""
        W, rank = self.world, self.rank
        arrivals = ARRIVALS[strategy]
        wanted = {d: arrivals(self, rank, d) for d in distances}
        arriving: Array = np.asarray(np.stack(list(wanted.values())).any(axis=0))
        place = np.cumsum(arriving, axis=1) - 1  # global block -> position in this buffer
        home = np.broadcast_to(self.local, arriving.shape)
        ring = strategy == "ring"
        passes_on = ring and distances[0] > 1
        receives, sends, returns, collects = [], [], [], []
        for d in distances:
            owner, reader = (rank - d) % W, (rank + d) % W  # reader: the rank whose owner we are
            source, target = ((rank - 1) % W, (rank + 1) % W) if ring else (owner, reader)
            receives.append(_transfer(source, wanted[d], place))
            leaves = np.cumsum(held, axis=1) - 1 if passes_on else home
            sends.append(_transfer(target, arrivals(self, target, d), leaves))
            returns.append(_transfer(owner, self.needed[rank] & self.owned[owner], place))
            collects.append(_transfer(reader, self.needed[reader] & self.owned[rank], home))
        step = Step(
            receives=_nonempty(receives),
            sends=_nonempty(sends),
            passes_on=passes_on,
            mask=self._mask(arriving),
            width=int(arriving.sum(axis=1).max()),
            returns=_nonempty(returns),
            collects=_nonempty(collects),
        )
        return step, arriving

    def _mask(self, held: Array) -> BlockMask | None:
        """The local queries against a buffer that holds some blocks: bool `[MB, blocks]`."""
        assert self.rows is not None
        mask = self.rows.select_kv([np.flatnonzero(row) for row in held])
        return mask if mask.visible_blocks else None

    def ring_arrivals(self, rank: int, distance: int) -> Array:
        """What comes to `rank` at step `distance`: all that a rank from here on still needs."""
        owner = (rank - distance) % self.world
        further = [(owner + d) % self.world for d in range(distance, self.world)]
        return self.needed[further].any(axis=0) & self.owned[owner]

    def direct_arrivals(self, rank: int, distance: int) -> Array:
        """What comes to `rank` from the owner at `distance`: just what it needs."""
        return self.needed[rank] & self.owned[(rank - distance) % self.world]

    def all_arrivals(self, rank: int, distance: int) -> Array:
        """Everything that the owner at `distance` holds, padding apart."""
        real = np.arange(self.layout.blocks) < self.layout.real_blocks
        return np.broadcast_to(
            self.owned[(rank - distance) % self.world] & real, self.needed.shape[1:]
        )


ARRIVALS: dict[str, Callable[[_Planner, int, int], Array]] = {
    "ring": _Planner.ring_arrivals,
    "direct": _Planner.direct_arrivals,
    "all_gather": _Planner.all_arrivals,
}
STRATEGIES = tuple(ARRIVALS)


def received_blocks(strategy: str, layout: Layout, needed: Array) -> Array:
    """int64 `[W]`: K/V blocks that each rank receives, summed over the mask's batch elements."""
    W = layout.world_size
    planner = _Planner(0, layout, needed)
    arrivals = ARRIVALS[strategy]
    return np.array(
        [sum(int(arrivals(planner, r, d).sum()) for d in range(1, W)) for r in range(W)]
    )


def _schedule(strategy: str, reads: Array) -> list[list[int]]:
    """The distances to owners that each step after the local one serves; idle ones are left out.

    Args:
        reads: bool `[W, W]`: whether the rank at a distance (second axis) after an owner (first)
            needs a block of it.
    """
    every = list(range(1, reads.shape[0]))
    busy = [d for d in every if reads[:, d].any()]
    if strategy == "all_gather":
        return [every] if every else []
    if strategy == "ring":  # what goes far passes through all ranks before
        return [[d] for d in every[: max(busy, default=0)]]
    return [[d] for d in busy]


def _transfer(peer: int, chosen: Array, place: Array) -> Transfer:
    """`chosen` bool `[MB, blocks]`, by their positions `place` in a buffer."""
    return Transfer(peer, tuple(p[c] for c, p in zip(chosen, place, strict=True)))


def _nonempty(transfers: list[Transfer]) -> tuple[Transfer, ...]:
    return tuple(t for t in transfers if t.count)
