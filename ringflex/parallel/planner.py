"""Makes plans: for this rank of a process group, for all ranks of none, for one device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
from torch import Tensor

from ringflex.masks.block_mask import BlockMask
from ringflex.masks.builder import BlockMaskBuilder
from ringflex.masks.runs import Array
from ringflex.masks.trace import trace_mask
from ringflex.parallel.comm import Communicator, communicator
from ringflex.parallel.layout import LAYOUTS, Layout, make_layout
from ringflex.parallel.plan import Plan, stats_of
from ringflex.parallel.steps import STRATEGIES, Step, build_steps, received_blocks

MaskFunction = Callable[..., Tensor]

# What receiving a K/V block costs beside the computation it hides behind, in visible blocks
# computed: about half its transfer on NVLink, in bf16 with four query heads to a K/V head.
_BLOCKS_PER_TRANSFER = 2.5


@dataclass(frozen=True, kw_only=True)
class _Request:
    """The checked arguments of a plan, the same on every rank."""

    seq_len: int
    world_size: int
    B: int | None
    H: int | None
    layout: str | Layout
    strategy: str
    block_size: int

    def __post_init__(self) -> None:
        for name in ("seq_len", "world_size", "block_size", "B", "H"):
            value = getattr(self, name)
            if value is None and name in "BH":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if self.strategy not in ("auto", *STRATEGIES):
            raise ValueError(
                f"strategy={self.strategy!r} is not one of auto, {', '.join(STRATEGIES)}"
            )
        if isinstance(self.layout, Layout):
            mine = (self.seq_len, self.world_size, self.block_size)
            theirs = (self.layout.seq_len, self.layout.world_size, self.layout.block_size)
            if mine != theirs:
                raise ValueError(
                    f"the layout is for (seq_len, world_size, block_size) = {theirs}, "
                    f"this plan for {mine}"
                )
        elif self.layout not in ("auto", *LAYOUTS):
            raise ValueError(f"layout={self.layout!r} is not one of auto, {', '.join(LAYOUTS)}")

    def layouts(self) -> list[Layout]:
        """The layouts to choose from."""
        if isinstance(self.layout, Layout):
            return [self.layout]
        names = [*LAYOUTS] if self.layout == "auto" else [self.layout]
        sizes = (self.seq_len, self.world_size, self.block_size)
        made = [make_layout(name, *sizes) for name in names]
        return made if self.world_size > 1 else made[:1]


@overload
def plan(
    mask_mod: MaskFunction,
    seq_len: int,
    group: Any = None,
    *,
    B: int | None = None,
    H: int | None = None,
    layout: str | Layout = "auto",
    strategy: str = "auto",
    block_size: int = 128,
) -> Plan: ...
@overload
def plan(
    mask_mod: Mapping[str, MaskFunction],
    seq_len: int,
    group: Any = None,
    *,
    B: int | None = None,
    H: int | None = None,
    layout: str | Layout = "auto",
    strategy: str = "auto",
    block_size: int = 128,
) -> dict[str, Plan]: ...
def plan(
    mask_mod: MaskFunction | Mapping[str, MaskFunction],
    seq_len: int,
    group: Any = None,
    *,
    B: int | None = None,
    H: int | None = None,
    layout: str | Layout = "auto",
    strategy: str = "auto",
    block_size: int = 128,
) -> Plan | dict[str, Plan]:
    """This rank's plan for attention over a sequence sharded across `group`. A collective.

    Each rank builds the block mask of its own queries only; ranks agree on the arguments and
    exchange which K/V blocks they need in two small all-gathers.

    >>> plan = rf.plan(rf.causal() & rf.document(doc_ids), seq_len=S, group=mesh["cp"])
    >>> plans = rf.plan({"local": local, "global": everything}, seq_len=S)  # one shared layout

    Args:
        mask_mod: a mask, or a dict of the masks of one model's layers.
        seq_len: true tokens of the whole sequence; any length.
        group: a ProcessGroup, a 1-D DeviceMesh, or None: the world if torch.distributed is
            initialised, else this process alone.
        B, H: batch elements and query heads; needed where the mask depends on them.
        layout: "contiguous", "zigzag", "striped", a `Layout`, or "auto": the one whose slowest
            rank has the least to compute and receive (by a rule of thumb, not a measurement).
        strategy: "ring", "direct", "all_gather", or "auto": the fewest blocks received by any rank
            (ring if it is a tie).
        block_size: tokens per block of the mask, and of what is sent.

    Returns:
        A `Plan`, or a dict of them.

    Raises:
        TypeError, ValueError: bad arguments, on every rank; also if ranks disagree.
    """
    comm = communicator(group)
    alone = comm is None or comm.size == 1
    rank, world_size = (comm.rank, comm.size) if comm else (0, 1)
    masks = mask_mod if isinstance(mask_mod, Mapping) else {"": mask_mod}
    draft, error, records = None, None, np.zeros((0, 4), dtype=np.int64)
    try:
        request = _Request(
            seq_len=seq_len,
            world_size=world_size,
            B=B,
            H=H,
            layout=layout,
            strategy=strategy,
            block_size=block_size,
        )
        draft = _Draft(masks, request)
        rows = draft.rows(rank)
        records = _records(rows)
    except Exception as problem:  # the other ranks must hear of it where they wait for this one
        if alone:
            raise
        error = problem
    if comm is None or alone:
        gathered = [records]
    else:
        what, digest = draft.identity if draft else ("", b"")
        counts = comm.agree(what, digest, error, count=records.shape[0])
        gathered = comm.all_gather_rows(records, counts)
    assert draft is not None
    plans = draft.plans(rank, rows, gathered, comm)
    return plans if isinstance(mask_mod, Mapping) else plans[""]


def plan_all(
    mask_mod: MaskFunction,
    seq_len: int,
    world_size: int,
    *,
    B: int | None = None,
    H: int | None = None,
    layout: str | Layout = "auto",
    strategy: str = "auto",
    block_size: int = 128,
) -> list[Plan]:
    """The plans of all ranks in one process, with no process group: for tests and simulation.

    Arguments as in `plan`. The plans cannot run on several ranks: they have no communicator.
    """
    request = _Request(
        seq_len=seq_len,
        world_size=world_size,
        B=B,
        H=H,
        layout=layout,
        strategy=strategy,
        block_size=block_size,
    )
    draft = _Draft({"": mask_mod}, request)
    rows = [draft.rows(rank) for rank in range(world_size)]
    gathered = [_records(r) for r in rows]
    return [draft.plans(rank, rows[rank], gathered, None)[""] for rank in range(world_size)]


def single_device_plan(block_mask: BlockMask) -> Plan:
    """A block mask as a plan of one rank and one step.

    All but the plan itself is kept on the mask; the plan refers to the mask, which would outlive
    its last use in a cycle.
    """
    steps = (Step(mask=block_mask, width=block_mask.kv_blocks),)
    if "plan" not in block_mask.cache:
        layout = Layout(
            name="contiguous",
            seq_len=block_mask.q_limit,
            world_size=1,
            block_size=block_mask.block_size[0],
            owner=np.zeros(block_mask.q_blocks, dtype=np.int64),
        )
        block_mask.cache["plan"] = {
            "layout": layout,
            "needed": block_mask.needed()[None],
            "stats": stats_of(layout, 0, steps, [block_mask.visible_blocks], block_mask.B),
            "cache": {},
        }
    return Plan(
        rank=0,
        world_size=1,
        strategy="direct",
        rows=block_mask,
        steps=steps,
        identity=block_mask.mask.name,
        **block_mask.cache["plan"],
    )


class _Draft:
    """Masks and layouts to choose from, before the ranks have told each other their needs."""

    def __init__(self, masks: Mapping[str, MaskFunction], request: _Request) -> None:
        if not masks:
            raise ValueError("plan() got an empty dict of masks")
        self.request = request
        self.layouts = request.layouts()
        self.builders = {
            name: BlockMaskBuilder(
                trace_mask(mask),
                B=request.B,
                H=request.H,
                q_limit=request.seq_len,
                kv_limit=request.seq_len,
                block_size=(request.block_size, request.block_size),
            )
            for name, mask in masks.items()
        }

    @cached_property
    def identity(self) -> tuple[str, bytes]:
        """The request in words, and 16 bytes that also cover the masks' captured values."""
        r = self.request
        layout = r.layout.name if isinstance(r.layout, Layout) else r.layout
        masks = ", ".join(f"{n}{': ' * bool(n)}{b.mask.name}" for n, b in self.builders.items())
        what = (
            f"plan(seq_len={r.seq_len}, B={r.B}, H={r.H}, layout={layout}, "
            f"strategy={r.strategy}, block_size={r.block_size}, mask {masks})"
        )
        state = hashlib.blake2b(what.encode(), digest_size=16)
        for builder in self.builders.values():
            state.update(builder.mask.digest())
        for each in self.layouts:
            state.update(each.owner.tobytes())
        return what, state.digest()

    def rows(self, rank: int) -> list[list[BlockMask]]:
        """The block mask of one rank's queries, per layout and mask."""
        size = self.request.block_size
        return [
            [
                builder.build(
                    layout.blocks_of(rank) * size,
                    layout.blocks,
                    q_len=layout.local_len,
                    kv_len=layout.blocks * size,
                )
                for builder in self.builders.values()
            ]
            for layout in self.layouts
        ]

    def plans(
        self,
        rank: int,
        rows: list[list[BlockMask]],
        gathered: list[Array],
        comm: Communicator | None,
    ) -> dict[str, Plan]:
        """The plans of one rank on the best layout, from the records of all ranks."""
        groups = [builder.B for builder in self.builders.values()]
        known = [
            [_needs(gathered, i, m, groups[m], layout.blocks) for m in range(len(groups))]
            for i, layout in enumerate(self.layouts)
        ]
        best = _best_layout(self.layouts, known, [b.H for b in self.builders.values()])
        layout = self.layouts[best]
        plans = {}
        for m, name in enumerate(self.builders):
            needed, work = known[best][m]
            strategy = self.request.strategy
            if strategy == "auto":
                strategy = _best_strategy(layout, needed)
            steps = build_steps(strategy, rank, layout, needed, rows[best][m])
            plans[name] = Plan(
                rank=rank,
                world_size=layout.world_size,
                layout=layout,
                strategy=strategy,
                rows=rows[best][m],
                steps=steps,
                needed=needed,
                stats=stats_of(layout, rank, steps, work.tolist(), groups[m]),
                identity=f"{self.identity[1].hex()} {name} {layout.name} {strategy}",
                comm=comm,
            )
        return plans


def _records(rows: list[list[BlockMask]]) -> Array:
    """What a rank tells the others, int64 `[n, 4]`: (layout, mask, -1, work in blocks), and
    (layout, mask, start, end) for each range of blocks needed, batch elements laid end to end."""
    records = []
    for i, masks in enumerate(rows):
        for m, mask in enumerate(masks):
            records.append(np.array([[i, m, -1, mask.visible_blocks]], dtype=np.int64))
            edges = np.diff(mask.needed().reshape(-1).astype(np.int8), prepend=0, append=0)
            ranges = np.stack([np.flatnonzero(edges > 0), np.flatnonzero(edges < 0)], axis=1)
            tag = np.broadcast_to(np.array([i, m]), ranges.shape)
            records.append(np.concatenate([tag, ranges], axis=1))
    return np.concatenate(records)


def _needs(
    gathered: list[Array], layout: int, mask: int, groups: int, blocks: int
) -> tuple[Array, Array]:
    """Of one layout and mask: needed bool `[W, groups, blocks]`, work int64 `[W]`."""
    needed = np.zeros((len(gathered), groups * blocks), dtype=bool)
    work = np.zeros(len(gathered), dtype=np.int64)
    for rank, records in enumerate(gathered):
        mine = records[(records[:, 0] == layout) & (records[:, 1] == mask)]
        for _, _, start, end in mine:
            if start < 0:
                work[rank] = end
            else:
                needed[rank, start:end] = True
    return needed.reshape(-1, groups, blocks), work


def _best_layout(
    layouts: list[Layout], known: list[list[tuple[Array, Array]]], heads: list[int]
) -> int:
    """Index of the layout whose slowest rank, computing and receiving, is done first.

    Args:
        known: needs and work per layout and mask.
        heads: query heads that the work of each mask is summed over.
    """

    def slowest(layout: Layout, masks: list[tuple[Array, Array]]) -> float:
        moved = [received_blocks("direct", layout, needed) for needed, _ in masks]
        work = [work / h for (_, work), h in zip(masks, heads, strict=True)]
        return float((np.sum(work, axis=0) + _BLOCKS_PER_TRANSFER * np.sum(moved, axis=0)).max())

    return min(range(len(layouts)), key=lambda i: slowest(layouts[i], known[i]))


def _best_strategy(layout: Layout, needed: Array) -> str:
    return min(STRATEGIES, key=lambda s: received_blocks(s, layout, needed).max())
