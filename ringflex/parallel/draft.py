"""A plan in the making: its checked arguments, its masks, its layout once that is known. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringflex.masks.block_mask import BlockMask
from ringflex.masks.builder import BlockMaskBuilder
from ringflex.masks.mods import MaskMod
from ringflex.masks.runs import Array
from ringflex.masks.trace_cache import traced_mask
from ringflex.masks.traced_mod import TracedMod
from ringflex.parallel.layout import LAYOUTS, Layout, make_layout
from ringflex.parallel.links import Costs, whole_nodes
from ringflex.parallel.machine import AttentionShape, Machine
from ringflex.parallel.needs import Reads, Work, need_rows, needs_of
from ringflex.parallel.plan import Outline, Plan, stats_of
from ringflex.parallel.strategies import STRATEGIES, build_steps, fastest_strategy
from ringflex.parallel.survey import (
    Relays,
    Survey,
    balanced_layout,
    best_layout,
    chunk_blocks,
    nested_layout,
)

if TYPE_CHECKING:
    from ringflex.parallel.comm import Communicator

MaskFunction = Callable[..., Tensor]

# Layouts that depend on the masks.
_CHOICES = {"auto": best_layout, "balanced": balanced_layout, "nested": nested_layout}


class Part(NamedTuple):
    """One of equal parts of the heads, from 0 on."""

    place: int = 0
    parts: int = 1


_WHOLE = Part()


@dataclass(frozen=True, kw_only=True)
class Request:
    """The checked arguments of a plan, the same on every rank.

    Attributes:
        multiple: every rank holds a multiple of so many blocks.
    """

    seq_len: int
    world_size: int
    B: int | None
    H: int | None
    layout: str | Layout
    strategy: str
    block_size: int
    machine: Machine = field(default_factory=Machine)
    shape: AttentionShape | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("seq_len", "world_size", "block_size", "B", "H"):
            value = getattr(self, name)
            if value is None and name in "BH":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if self.strategy not in ("auto", *STRATEGIES):
            strategies = ", ".join(("auto", *STRATEGIES, "ulysses"))
            raise ValueError(f"strategy={self.strategy!r} is not one of {strategies}")
        if not isinstance(self.machine, Machine):
            raise TypeError(f"machine must be an rf.Machine, got {type(self.machine).__name__}")
        if not isinstance(self.shape, AttentionShape | None):
            raise TypeError(f"shape must be an rf.AttentionShape, got {type(self.shape).__name__}")
        per_node = self.machine.gpus_per_node
        if self.strategy == "hierarchical" and self.world_size % min(per_node, self.world_size):
            raise ValueError(
                f"strategy='hierarchical' wants whole nodes: {self.world_size} ranks are not a "
                f"multiple of {per_node} GPUs per node; pass machine=rf.Machine(gpus_per_node=...)"
            )
        if isinstance(self.layout, Layout):
            mine = self.sizes
            theirs = (self.layout.seq_len, self.layout.world_size, self.layout.block_size)
            if mine != theirs:
                raise ValueError(
                    f"the layout is for (seq_len, world_size, block_size) = {theirs}, "
                    f"this plan for {mine}"
                )
            self.layout.check()
        elif self.layout not in (known := ["auto", *LAYOUTS, "balanced", "nested"]):
            raise ValueError(f"layout={self.layout!r} is not one of {', '.join(known)}")

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.seq_len, self.world_size, self.block_size

    def known_layout(self) -> Layout | None:
        """The layout, unless it depends on the masks."""
        found = self._known_layout()
        return found and found.padded(self.multiple)

    def _known_layout(self) -> Layout | None:
        if isinstance(self.layout, Layout):
            return self.layout
        if self.layout not in _CHOICES:
            return make_layout(self.layout, *self.sizes)
        if self.world_size > 1:
            return None
        alone = make_layout("contiguous", *self.sizes)
        return alone if self.layout == "auto" else replace(alone, name=self.layout)


class Draft:
    """The masks of a plan, on the way to it.

    Attributes:
        layout: None while it is to be chosen.
        chunks: blocks per chunk of a survey, and blocks surveyed in all, padding included.
        rows: the block mask of a rank's queries, per mask, by rank.
        heard: of each mask, what all ranks read and compute, and the strategy.
        captured: bytes that stand for the masks and their captured values.
    """

    def __init__(self, masks: Mapping[str, MaskFunction], request: Request) -> None:
        if not masks:
            raise ValueError("plan() got an empty dict of masks")
        self.masks, self.request = dict(masks), request
        self.costs = Costs.of(request.machine, request.block_size, request.shape)
        self.layout = request.known_layout()
        self.rows: dict[int, list[BlockMask]] = {}
        self.heard: list[tuple[Reads, Work, str]] = []
        self.shares: dict[tuple[str, Part], TracedMod] = {}  # masks of parts of the heads
        self.builders = {
            name: BlockMaskBuilder(
                traced_mask(mask),
                B=request.B,
                H=request.H,
                q_limit=request.seq_len,
                kv_limit=request.seq_len,
                block_size=(request.block_size, request.block_size),
            )
            for name, mask in masks.items()
        }
        real = -(-request.seq_len // request.block_size)
        layers = sum(builder.B for builder in self.builders.values())
        chunk = chunk_blocks(real, request.world_size, layers)
        step = request.world_size * chunk
        self.chunks = chunk, -(-real // step) * step
        self.captured = b"".join(builder.mask.digest() for builder in self.builders.values())

    def identity(self) -> tuple[str, bytes]:
        """The request in words, and 16 bytes that also cover the masks' captured values."""
        r = self.request
        layout = r.layout.name if isinstance(r.layout, Layout) else r.layout
        masks = ", ".join(f"{n}{': ' * bool(n)}{b.mask.name}" for n, b in self.builders.items())
        what = (
            f"plan(seq_len={r.seq_len}, B={r.B}, H={r.H}, layout={layout}, "
            f"strategy={r.strategy}, block_size={r.block_size}, mask {masks}"
            + f", {r.machine}" * (r.machine != Machine())
            + f", {r.shape}" * (r.shape is not None)
            + f", {r.multiple} GPUs" * (r.multiple > 1)
            + ")"
        )
        state = hashlib.blake2b(what.encode() + self.captured, digest_size=16)
        if self.layout is not None:
            state.update(self.layout.owner.tobytes())
        return what, state.digest()

    def survey(self, rank: int) -> Array:
        """What one rank tells of its share of the masks before the layout is chosen."""
        chunk, blocks = self.chunks
        share = blocks // self.request.world_size
        rows = self._build(np.arange(rank * share, (rank + 1) * share), blocks)
        return Survey.of(rows, chunk).rows()

    def choose(self, told: list[Array]) -> None:
        """Settles the layout by the surveys of all ranks."""
        chunk, blocks = self.chunks
        builders = self.builders.values()
        layers = sum(builder.B for builder in builders)
        heads = math.lcm(*(builder.H for builder in builders))
        survey = Survey.from_rows(np.concatenate(told), chunk, heads, layers * blocks // chunk)
        choice = _CHOICES[self.request.layout]  # type: ignore[index]
        found = choice(survey, *self.request.sizes, self.costs, self._relays())
        self.layout = found.padded(self.request.multiple)

    def prepare(self, ranks: Iterable[int]) -> None:
        """All that comes before the plans, of all ranks in one process."""
        if self.layout is None:
            self.choose([self.survey(rank) for rank in ranks])
        self.hear([self.needs(rank) for rank in ranks])

    def _relays(self) -> Relays:
        strategy, W = self.request.strategy, self.request.world_size
        if not whole_nodes(W, self.request.machine.gpus_per_node):
            return Relays.NEVER
        return {"hierarchical": Relays.ALWAYS, "auto": Relays.IF_FASTER}.get(strategy, Relays.NEVER)

    def settle(self, rank: int, told: list[Array]) -> tuple[tuple[str, bytes], Array]:
        """Chooses the layout; then what this rank tells of its rows on it."""
        self.choose(told)
        return self.identity(), self.needs(rank)

    def needs(self, rank: int) -> Array:
        """What one rank tells of its rows on the layout, which are kept."""
        assert self.layout is not None
        self.rows[rank] = self._build(self.layout.blocks_of(rank), self.layout.blocks)
        return need_rows(self.rows[rank], self.layout)

    def _build(self, q_blocks: Array, blocks: int) -> list[BlockMask]:
        """Some query blocks of each mask against the whole sequence."""
        size = self.request.block_size
        return [
            builder.build(q_blocks * size, blocks, q_len=q_blocks.size * size, kv_len=blocks * size)
            for builder in self.builders.values()
        ]

    def hear(self, told: list[Array]) -> None:
        """What all ranks told of their rows on the layout."""
        assert self.layout is not None
        self.heard = []
        for m, builder in enumerate(self.builders.values()):
            needs, work = needs_of(told, m, builder.B, self.layout.blocks)
            reads = Reads(self.layout, needs, self.costs)
            strategy = self.request.strategy
            if strategy == "auto":
                strategy = fastest_strategy(reads)
            self.heard.append((reads, work, strategy))

    def plans(self, rank: int, comm: Communicator | None, part: Part = _WHOLE) -> dict[str, Plan]:
        """The plans of one rank, by what was heard; part: for so many of the heads only."""
        layout, digest = self.layout, self.identity()[1].hex()
        assert layout is not None
        plans = {}
        for (name, builder), all_rows, (reads, work, strategy) in zip(
            self.builders.items(), self.rows[rank], self.heard, strict=True
        ):
            rows = self._of_heads(name, all_rows, part)
            steps = build_steps(strategy, rank, reads, rows)
            plans[name] = Plan(
                rank=rank,
                world_size=layout.world_size,
                layout=layout,
                strategy=strategy,
                rows=rows,
                steps=steps,
                outline=Outline(reads, work),
                stats=stats_of(layout, rank, steps, work.by_rank(), builder.B),
                identity=f"{digest} {name} {layout.name} {strategy}",
                comm=comm,
            )
        return plans

    def share(self, part: Part) -> None:
        """Makes ready for plans of a part of the heads, with what masks capture as it is now."""
        for name, builder in self.builders.items():
            if part.parts > 1 and "h" in builder.mask.uses and (name, part) not in self.shares:
                mask, heads = self.masks[name], builder.H // part.parts
                first = torch.tensor(part.place * heads, device="cpu")
                of_part = lambda b, h, q, kv, mask=mask, first=first: mask(b, h + first, q, kv)
                self.shares[name, part] = traced_mask(MaskMod(of_part, builder.mask.name)).frozen()

    def _of_heads(self, name: str, rows: BlockMask, part: Part) -> BlockMask:
        """A block mask for a part of the heads; the same one where it does not depend on them."""
        self.share(part)
        mask = self.shares.get((name, part))
        if mask is None:
            return rows
        heads = rows.H // part.parts
        return rows.of_heads(part.place * heads, heads, mask)
