"""BlockMask: which blocks of keys each block of queries sees, as runs.

Per row (one block of queries, of one batch element and head if the mask depends on them) there are
two lists of runs `[start, end)` of K/V blocks: *full* blocks, whose every element is visible, and
*partial* blocks, in which the mask must be asked. Lists are CSR arrays on the host: a causal mask
of 8,192 rows is two runs a row. Blocks know their global starts, so a sequence may be cut into
chunks and dealt out in any order while the mask still sees global indices.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringflex.masks.runs import Array, Runs, union
from ringflex.masks.traced_mod import TracedMod


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The visible blocks of a mask over queries and keys in hand.

    Attributes:
        mask: the traced mask mod; asked in partial blocks, with global indices.
        B, H: batch elements and heads that the lists distinguish; 1 where the mask does not.
        block_size: tokens per block of queries and per block of keys.
        q_len, kv_len: tokens in hand (rows of the query tensor, of the key tensor).
        q_starts: global position of each query block, int64 `[query blocks]`.
        kv_starts: global position of each K/V block, int64 `[1 or B, K/V blocks]`.
        q_limit, kv_limit: positions from here on are padding.
        full, partial: runs of K/V blocks for row `(b * H + h) * query blocks + block`.
    """

    mask: TracedMod
    B: int
    H: int
    block_size: tuple[int, int]
    q_len: int
    kv_len: int
    q_starts: Array
    kv_starts: Array
    q_limit: int
    kv_limit: int
    full: Runs
    partial: Runs
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)  # device copies, by kernel

    def __copy__(self) -> BlockMask:
        return self

    def __deepcopy__(self, memo: Any) -> BlockMask:
        """Itself, which does not change: so a module that holds it can be copied."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a BlockMask cannot be pickled: pass on what its mask captures, and make it where it "
            "is used"
        )

    @property
    def q_blocks(self) -> int:
        """Blocks of queries in hand."""
        return self.q_starts.size

    @property
    def kv_blocks(self) -> int:
        """Blocks of keys in hand."""
        return self.kv_starts.shape[1]

    @property
    def visible_blocks(self) -> int:
        """Blocks computed, summed over the B and H that the mask distinguishes."""
        return self.full.blocks + self.partial.blocks

    @property
    def density(self) -> float:
        """Share of all blocks that is computed."""
        return self.visible_blocks / max(1, self.B * self.H * self.q_blocks * self.kv_blocks)

    def transpose(self) -> tuple[Runs, Runs]:
        """Full and partial runs of query blocks for row `(b * H + h) * kv_blocks + block`."""
        return (
            self.full.transpose(self.q_blocks, self.kv_blocks),
            self.partial.transpose(self.q_blocks, self.kv_blocks),
        )

    def needed_ranges(self) -> list[tuple[Array, Array]]:
        """Per batch element (`[B]`): starts and ends of the ranges of K/V blocks that some query in
        hand sees, in any head, ascending."""
        pieces = [
            (runs.row // (self.H * self.q_blocks), runs) for runs in (self.full, self.partial)
        ]
        b = np.concatenate([group for group, _ in pieces])
        start = np.concatenate([runs.start for _, runs in pieces])
        end = np.concatenate([runs.end for _, runs in pieces])
        joined = union(b, start, end, self.B)
        bounds = [slice(i, j) for i, j in zip(joined.indptr[:-1], joined.indptr[1:], strict=True)]
        return [(joined.start[i], joined.end[i]) for i in bounds]

    def needed(self) -> Array:
        """bool `[B, kv_blocks]`: K/V blocks that some query in hand sees, in any head."""
        found = np.zeros((self.B, self.kv_blocks), dtype=bool)
        for row, ranges in zip(found, self.needed_ranges(), strict=True):
            for start, end in zip(*ranges, strict=True):
                row[start:end] = True
        return found

    def select_kv(self, columns: list[Array]) -> BlockMask:
        """The mask over a K/V tensor that holds only some blocks, side by side.

        Args:
            columns: for each batch element that the mask distinguishes (`[B]`), the blocks held,
                ascending; shorter lists are padded with blocks that nobody sees.
        """
        assert len(columns) == self.B
        width = max((c.size for c in columns), default=0)
        kv_starts = np.full((self.B, width), self.kv_limit, dtype=np.int64)
        for b, held in enumerate(columns):
            kv_starts[b, : held.size] = self.kv_starts[b % self.kv_starts.shape[0], held]
        sizes = np.array([held.size for held in columns])
        before = np.cumsum(sizes) - sizes
        keys = np.concatenate([held + b * (self.kv_blocks + 1) for b, held in enumerate(columns)])

        def select(runs: Runs) -> Runs:
            row = runs.row
            b = row // (self.H * self.q_blocks)
            at = b * (self.kv_blocks + 1)
            start, end = (np.searchsorted(keys, at + x) - before[b] for x in (runs.start, runs.end))
            return Runs.from_pieces(row, start, end, runs.rows)

        return BlockMask(
            mask=self.mask,
            B=self.B,
            H=self.H,
            block_size=self.block_size,
            q_len=self.q_len,
            kv_len=width * self.block_size[1],
            q_starts=self.q_starts,
            kv_starts=kv_starts,
            q_limit=self.q_limit,
            kv_limit=self.kv_limit,
            full=select(self.full),
            partial=select(self.partial),
        )

    def of_heads(self, first: int, count: int, mask: TracedMod) -> BlockMask:
        """Of some of the heads that it distinguishes, counted from 0 by a mask of their own."""

        def select(runs: Runs) -> Runs:
            group, block = np.divmod(runs.row, self.q_blocks)
            b, h = np.divmod(group, self.H)
            mine = (h >= first) & (h < first + count)
            row = (b * count + h - first) * self.q_blocks + block
            rows = self.B * count * self.q_blocks
            return Runs.from_pieces(row[mine], runs.start[mine], runs.end[mine], rows)

        full, partial = select(self.full), select(self.partial)
        return replace(self, mask=mask, H=count, full=full, partial=partial, cache={})

    def block_map(self) -> Array:
        """uint8 `[B, H, q_blocks, kv_blocks]`: 0 not visible, 1 partial, 2 full."""
        states = np.zeros((self.B * self.H * self.q_blocks, self.kv_blocks), dtype=np.uint8)
        for runs, state in ((self.partial, 1), (self.full, 2)):
            states[runs.pairs()] = state
        return states.reshape(self.B, self.H, self.q_blocks, self.kv_blocks)

    def to_dense(self) -> Tensor:
        """bool `[B, H, q_len, kv_len]` on the CPU, element by element: for tests and pictures."""
        bq, bk = self.block_size
        states = torch.from_numpy(self.block_map()).repeat_interleave(bq, 2)
        states = states.repeat_interleave(bk, 3)
        q_idx = torch.from_numpy(self.q_starts)[:, None] + torch.arange(bq, device="cpu")
        q_idx = q_idx.reshape(-1)
        kv_idx = torch.from_numpy(self.kv_starts)[:, :, None] + torch.arange(bk, device="cpu")
        kv_idx = kv_idx.reshape(kv_idx.shape[0], 1, 1, -1)
        inside = (q_idx < self.q_limit).reshape(1, 1, -1, 1) & (kv_idx < self.kv_limit)
        seen = self.mask.to(torch.device("cpu")).evaluate(
            torch.arange(self.B, device="cpu").reshape(-1, 1, 1, 1),
            torch.arange(self.H, device="cpu").reshape(1, -1, 1, 1),
            q_idx.clamp(max=max(0, self.q_limit - 1)).reshape(1, 1, -1, 1),
            kv_idx.clamp(max=max(0, self.kv_limit - 1)),
        )
        dense = (states == 2) | ((states == 1) & inside & seen)
        return dense[:, :, : self.q_len, : self.kv_len]

    def picture(self, b: int = 0, h: int = 0, *, columns: int = 64) -> str:
        """The mask of one batch element and head as text, queries downwards, keys to the right."""
        height = max(1, min(self.q_blocks, columns // 2))
        width = max(1, min(self.kv_blocks, columns))
        base = (b * self.H + h) * self.q_blocks
        covered = np.zeros((2, height, width))
        for kind, runs in enumerate((self.full, self.partial)):
            row = runs.row
            mine = (row >= base) & (row < base + self.q_blocks)
            y = (row[mine] - base) * height // max(1, self.q_blocks)
            for x in range(width):
                left, right = (-(-edge * self.kv_blocks // width) for edge in (x, x + 1))
                overlap = np.minimum(runs.end[mine], right) - np.maximum(runs.start[mine], left)
                np.add.at(covered[kind, :, x], y, np.maximum(overlap, 0))
        rows = np.bincount(np.arange(self.q_blocks) * height // self.q_blocks, minlength=height)
        edges = -(-np.arange(width + 1) * self.kv_blocks // width)
        area = rows[:, None] * np.diff(edges)[None, :]
        share = (covered[0] + covered[1]) / np.maximum(area, 1)
        shade = np.array(list(" ░▒▓"))[np.ceil(np.clip(share, 0, 1) * 3).astype(int)]
        shade = np.where(covered[0] >= area, "█", shade)
        return "\n".join("".join(line) for line in shade)

    def __str__(self) -> str:
        bq, bk = self.block_size
        return (
            f"BlockMask({self.mask.name}, B={self.B}, H={self.H}, q_len={self.q_len}, "
            f"kv_len={self.kv_len}, block_size=({bq}, {bk}), {self.density:.1%} of blocks visible: "
            f"{self.full.blocks} full, {self.partial.blocks} partial)\n{self.picture()}"
        )

    __repr__ = __str__
