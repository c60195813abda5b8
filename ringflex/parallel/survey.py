"""The masks of a plan in outline, as rows of int64, and the layouts that follow. Pure.

Before the layout is chosen, each rank surveys an equal contiguous share of the queries: the work
and the needs of each chunk of blocks, a bit per chunk of K/V.

Legend: W ranks, C chunks, K = layers * C columns (see balance.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ringflex.masks.block_mask import BlockMask
from ringflex.masks.runs import Array
from ringflex.parallel.balance import balance
from ringflex.parallel.layout import LAYOUTS, Layout, make_layout
from ringflex.parallel.links import Costs, whole_nodes
from ringflex.parallel.nested import by_pieces, by_windows
from ringflex.parallel.swaps import Problem

# The balanced layout counts a block received for so many times what it costs: within its limit of
# balance it saves bytes, which other traffic may want, rather than the last percent of work.
_THRIFT = 16

_CHUNKS = 2048  # of one layer; more layers share the room
_GAIN = 0.02  # what a balanced layout might at best save, to be worth looking for
_LEAD = 0.02  # what it must then really save
_TIE = 0.05


@dataclass(frozen=True, eq=False, kw_only=True)
class Survey:
    """The masks of a plan in outline, of all queries or of some.

    Attributes:
        chunk: blocks per chunk.
        heads: the work of one block over each mask's heads is this much.
        work: of each chunk of queries, int64 `[chunks]`, over all masks and batch elements.
        need: bool `[chunks, K]`: the K/V chunks that it sees.
    """

    chunk: int
    heads: int
    work: Array
    need: Array

    @classmethod
    def of(cls, masks: Sequence[BlockMask], chunk: int) -> Survey:
        """Of the queries of some rows, against the whole sequence. All masks weigh the same."""
        heads = math.lcm(*(mask.H for mask in masks))
        work, needs = np.zeros(masks[0].q_blocks // chunk, dtype=np.int64), []
        for mask in masks:
            chunks, columns = mask.q_blocks // chunk, mask.kv_blocks // chunk
            edges = np.zeros((chunks, mask.B, columns + 1), dtype=np.int32)
            for runs in (mask.full, mask.partial):
                layer, block = np.divmod(runs.row, mask.q_blocks)
                at = block // chunk, layer // mask.H
                np.add.at(edges, (*at, runs.start // chunk), 1)
                np.add.at(edges, (*at, (runs.end - 1) // chunk + 1), -1)
                blocks = np.bincount(at[0], runs.end - runs.start, chunks).astype(np.int64)
                work += heads // mask.H * blocks
            needs.append((np.cumsum(edges, axis=2)[:, :, :-1] > 0).reshape(chunks, -1))
        return cls(chunk=chunk, heads=heads, work=work, need=np.concatenate(needs, axis=1))

    def rows(self) -> Array:
        """int64 `[chunks, 1 + words]`: work, and needs as bits."""
        bits = np.packbits(self.need, axis=1)
        bits = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8)))
        return np.concatenate([self.work[:, None], bits.view(np.int64)], axis=1)

    @classmethod
    def from_rows(cls, rows: Array, chunk: int, heads: int, columns: int) -> Survey:
        """What `rows` said, of all ranks one after the other."""
        bits = np.ascontiguousarray(rows[:, 1:]).view(np.uint8)
        need = np.unpackbits(bits, axis=1, count=columns).astype(bool)
        return cls(chunk=chunk, heads=heads, work=rows[:, 0], need=need)

    def slowest(self, owner: Array, world_size: int, costs: Costs, relays: Relays) -> float:
        """When the slowest rank is done computing, receiving and sending, in visible blocks
        computed."""
        work = np.bincount(owner, self.work, world_size) / self.heads
        links = self._links(owner, world_size, costs, relays)
        # Where links are what counts, less work is still better.
        return float(max(work.max() + costs.hidden * links, links) + _TIE * work.max())

    def _links(self, owner: Array, world_size: int, costs: Costs, relays: Relays) -> float:
        owners = np.tile(owner, self.need.shape[1] // owner.size)

        def read_by(reader: Array) -> Array:
            sees = [self.need[reader == r].any(axis=0) for r in range(int(reader.max()) + 1)]
            chunks = np.stack([np.bincount(owners[s], minlength=world_size) for s in sees])
            return self.chunk * chunks

        read, share = read_by(owner), self.chunk * self.need.shape[1] // world_size
        np.fill_diagonal(read, 0)
        found = []
        if relays is not Relays.ALWAYS:
            found.append(costs.direct(read, share).busy)
        if relays is not Relays.NEVER:
            union = read_by(owner // costs.node)
            found.append(costs.relayed(read, union, share).busy)
        return min(found)

    def bound(self, world_size: int, costs: Costs, relays: Relays) -> float:
        """What no even layout's `slowest` is less than: one row may see more than a rank holds, or
        its node."""
        sees = int(self.need.sum(axis=1).max())
        share = self.need.shape[1] // world_size
        comes, far = max(0, sees - share), max(0, sees - share * costs.node)
        if relays is not Relays.NEVER:
            far //= costs.node
        both_ways = costs.near * costs.far / (costs.near + costs.far)
        links = self.chunk * max(costs.far * far, both_ways * comes)
        work = int(self.work.sum()) / world_size / self.heads
        return max(work + costs.hidden * links, links)


class Relays(Enum):
    """Whether blocks come to a node once, and go on within it."""

    NEVER = "never"
    ALWAYS = "always"
    IF_FASTER = "if faster"


def chunk_blocks(real_blocks: int, world_size: int, layers: int) -> int:
    """Blocks per chunk of a survey: 1 up to 2,048 blocks of one layer."""
    share = -(-real_blocks // world_size)
    most = max(int(_CHUNKS / math.sqrt(layers)), 4 * world_size)
    least = -(-share // (most // world_size))
    # Padding is less than a chunk on each rank, and none if a divisor is near.
    return next((size for size in range(least, 2 * least) if share % size == 0), least)


def balanced_layout(
    survey: Survey, seq_len: int, world_size: int, block_size: int, costs: Costs, relays: Relays
) -> Layout:
    """Every rank the same work within two percent, then as few blocks received as can be found."""
    transfer = _transfer(survey, costs)
    owner = balance(survey.work, survey.need, world_size, transfer=transfer)
    return _as_layout("balanced", owner, survey, seq_len, world_size, block_size)


def nested_layout(
    survey: Survey, seq_len: int, world_size: int, block_size: int, costs: Costs, relays: Relays
) -> Layout:
    """Stretches or pieces dealt onto nodes so that the slowest is done first, work and what comes
    from other nodes weighed by their cost; within each node, balanced."""
    problem = Problem(survey.work, survey.need, world_size, _transfer(survey, costs))
    far = costs.far
    if relays is not Relays.NEVER:  # a node's GPUs share what comes, and pass it on
        far = max(costs.near, far / costs.node)
    owners = [by_windows(problem, costs.node, far * survey.chunk * survey.heads)]
    if problem.pieces.size and whole_nodes(world_size, costs.node):
        owners.append(by_pieces(problem, costs.node))
    owner = min(owners, key=lambda owner: survey.slowest(owner, world_size, costs, relays))
    return _as_layout("nested", owner, survey, seq_len, world_size, block_size)


def _transfer(survey: Survey, costs: Costs) -> int:
    return round(_THRIFT * costs.hidden * costs.near * survey.chunk * survey.heads)


def _as_layout(
    name: str, owner: Array, survey: Survey, seq_len: int, world_size: int, block_size: int
) -> Layout:
    return Layout(
        name=name,
        seq_len=seq_len,
        world_size=world_size,
        block_size=block_size,
        owner=np.repeat(owner, survey.chunk),
    )


def best_layout(
    survey: Survey, seq_len: int, world_size: int, block_size: int, costs: Costs, relays: Relays
) -> Layout:
    """The layout whose slowest rank, computing, receiving and sending, is done first.

    Simple layouts are preferred where another could save little. Stripes of single blocks are not
    seen by a survey of larger chunks, and left out.
    """
    sizes = seq_len, world_size, block_size
    first = np.arange(survey.work.size) * survey.chunk  # block of each chunk

    def cost_of(layout: Layout) -> float:
        owner = layout.owner[np.minimum(first, layout.blocks - 1)]
        return survey.slowest(owner, world_size, costs, relays)

    simple = [n for n in LAYOUTS if n != "striped" or survey.chunk == 1]
    best = min((make_layout(name, *sizes) for name in simple), key=cost_of)
    least = cost_of(best)
    if least * (1 - _GAIN) <= survey.bound(world_size, costs, relays):
        return best
    search = nested_layout if world_size > costs.node else balanced_layout
    other = search(survey, *sizes, costs, relays)
    return other if cost_of(other) < least * (1 - _LEAD) else best
