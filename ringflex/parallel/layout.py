"""Which chunk of the global sequence sits on which rank. Pure: data in, data out.

A layout deals fixed-size chunks of whole blocks onto ranks. Every rank holds the same number of
blocks, in ascending global order; what does not divide is padded at the end of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ringflex.masks.runs import Array


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """An assignment of the blocks of one sequence to ranks.

    Attributes:
        name: "contiguous", "zigzag", "striped", "balanced", "nested".
        seq_len: true tokens of the sequence.
        world_size: ranks.
        block_size: tokens per block.
        owner: rank that holds each block, int64 `[blocks]`, padding blocks included; every rank
            holds as many.
    """

    name: str
    seq_len: int
    world_size: int
    block_size: int
    owner: Array

    def check(self) -> None:
        """Of a layout that a program made.

        Raises:
            TypeError: owners are no int64 array. ValueError: blocks are missing, or ranks own
                unlike numbers of them.
        """
        owner = self.owner
        if not isinstance(owner, np.ndarray) or owner.dtype != np.int64 or owner.ndim != 1:
            raise TypeError(f"owner must be an int64 array [blocks], got {owner!r:.80}")
        if owner.size < self.real_blocks:
            raise ValueError(
                f"owner names {owner.size} blocks of {self.block_size} tokens, too few for "
                f"{self.seq_len} tokens"
            )
        share, rest = divmod(owner.size, self.world_size)
        held = np.bincount(owner) if owner.min() >= 0 else np.array([])
        if rest or held.size != self.world_size or (held != share).any():
            raise ValueError(
                f"every rank below {self.world_size} must own as many blocks; by rank they own "
                f"{dict(zip(*(x.tolist() for x in np.unique(owner, return_counts=True))))}"
            )

    @property
    def blocks(self) -> int:
        """Blocks of the padded sequence: a multiple of `world_size`."""
        return self.owner.size

    @property
    def real_blocks(self) -> int:
        """Blocks that hold at least one true token."""
        return -(-self.seq_len // self.block_size)

    @property
    def local_len(self) -> int:
        """Token slots on each rank, padding included."""
        return self.blocks // self.world_size * self.block_size

    def blocks_of(self, rank: int) -> Array:
        """Global indices of the blocks that `rank` holds, ascending, int64."""
        return np.flatnonzero(self.owner == rank)

    def positions_of(self, rank: int) -> Array:
        """Global position of each token slot of `rank`, int64 `[local_len]`."""
        starts = self.blocks_of(rank) * self.block_size
        return (starts[:, None] + np.arange(self.block_size)).reshape(-1)

    def padded(self, multiple: int) -> Layout:
        """With more padding, so that every rank holds a multiple of that many blocks."""
        more = -(self.blocks // self.world_size) % multiple
        padding = np.repeat(np.arange(self.world_size), more)
        return replace(self, owner=np.concatenate([self.owner, padding])) if more else self


def make_layout(name: str, seq_len: int, world_size: int, block_size: int) -> Layout:
    """The layout `name` for a sequence.

    - `contiguous`: rank r holds the r-th stretch. Windows and documents stay together.
    - `zigzag`: 2W chunks, rank r holds chunks r and 2W-1-r: a causal triangle folds evenly.
    - `striped`: blocks dealt in turn (Brandon et al., "Striped Attention", 2023, with blocks for
      tokens).

    `balanced` and `nested` layouts depend on masks, so only `plan` and `plan_all` make them.

    Raises:
        ValueError: unknown name, or a size is not positive.
    """
    if name in ("balanced", "nested"):
        raise ValueError(
            f"layout={name!r} depends on the masks: take it from plan(..., layout={name!r})"
        )
    if name not in LAYOUTS:
        raise ValueError(f"layout={name!r} is not one of {', '.join(LAYOUTS)}")
    for label, value in (
        ("seq_len", seq_len),
        ("world_size", world_size),
        ("block_size", block_size),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{label} must be a positive int, got {value!r}")
    owner = LAYOUTS[name](-(-seq_len // block_size), world_size)
    return Layout(
        name=name, seq_len=seq_len, world_size=world_size, block_size=block_size, owner=owner
    )


def _contiguous(blocks: int, world_size: int) -> Array:
    return np.repeat(np.arange(world_size), -(-blocks // world_size))


def _zigzag(blocks: int, world_size: int) -> Array:
    ranks = np.arange(world_size)
    return np.repeat(np.concatenate([ranks, ranks[::-1]]), -(-blocks // (2 * world_size)))


def _striped(blocks: int, world_size: int) -> Array:
    return np.tile(np.arange(world_size), -(-blocks // world_size))


LAYOUTS: dict[str, Callable[[int, int], Array]] = {
    "contiguous": _contiguous,
    "zigzag": _zigzag,
    "striped": _striped,
}
