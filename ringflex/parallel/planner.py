"""Makes plans: for this rank of a process group, for all ranks of none, for one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ringflex.masks.block_mask import BlockMask
from ringflex.masks.runs import Array
from ringflex.modes import outside_inference_mode
from ringflex.parallel.comm import Agreement, Communicator, communicator
from ringflex.parallel.draft import Draft, MaskFunction, Part, Request
from ringflex.parallel.faster import FasterPlanning, is_faster, may_deal_heads
from ringflex.parallel.in_order import finish
from ringflex.parallel.layout import Layout
from ringflex.parallel.links import Costs
from ringflex.parallel.machine import AttentionShape, Machine
from ringflex.parallel.needs import Reads, need_rows, needs_of
from ringflex.parallel.plan import Outline, Plan, stats_of
from ringflex.parallel.recent import recall, remember
from ringflex.parallel.steps import Step

if TYPE_CHECKING:
    from ringflex.parallel.ulysses import UlyssesPlanning


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
    machine: Machine | None = None,
    shape: AttentionShape | None = None,
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
    machine: Machine | None = None,
    shape: AttentionShape | None = None,
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
    machine: Machine | None = None,
    shape: AttentionShape | None = None,
) -> Plan | dict[str, Plan]:
    """This rank's plan for attention over a sequence sharded across `group`. A collective.

    Each rank builds the block mask of its own queries only; ranks agree on the arguments and
    exchange which K/V blocks they need in two small all-gathers. For layouts "auto" and "balanced"
    each rank first outlines an equal share of the mask, and ranks exchange that in two more. A
    group's last four plans are kept: equal masks over equal captured values are planned once.

    >>> plan = rf.plan(rf.causal() & rf.document(doc_ids), seq_len=S, group=mesh["cp"])
    >>> plans = rf.plan({"local": local, "global": everything}, seq_len=S)  # one shared layout

    Args:
        mask_mod: a mask, or a dict of the masks of one model's layers.
        seq_len: true tokens of the whole sequence; any length.
        group: a ProcessGroup, a 1-D DeviceMesh, or None: the world if torch.distributed is
            initialised, else this process alone.
        B, H: batch elements and query heads; needed where the mask depends on them.
        layout: "contiguous", "zigzag", "striped", a `Layout`; "balanced": for these masks, every
            rank the same work within two percent where blocks are many, then as few K/V blocks
            received as can be found; "nested": the same within each node of `machine`, between
            nodes what is done first; or "auto": the one of them all whose slowest rank is done
            first, computing, receiving and sending.
        strategy: "ring", "direct", "all_gather"; "hierarchical": a block comes to a node once, and
            goes on within it, for nodes of `machine.gpus_per_node` ranks; "ulysses": heads are
            dealt to the GPUs of such a node by all-to-alls, and K/V moves between nodes, for each
            share of the heads on its own (heads of queries and of keys must be multiples of the
            GPUs); or "auto": of all but "all_gather" and "ulysses" the one that keeps links busy
            for the shortest time (ring if it is a tie), or "ulysses" if `shape` allows it.
        block_size: tokens per block of the mask, and of what is sent.
        machine: rates of the GPUs and links that "auto" and "nested" weigh; default: Hopper GPUs,
            eight to a node, ranks node by node.
        shape: of the layers, by which computing weighs against moving. With it, over several whole
            nodes "auto" plans "ulysses" as well where heads are multiples of a node's GPUs, and
            takes that if it is predicted to be done sooner.

    Returns:
        A `Plan`, or a dict of them.

    Raises:
        TypeError, ValueError: bad arguments, on every rank; also if ranks disagree.
    """
    request = {
        "seq_len": seq_len, "B": B, "H": H, "layout": layout, "strategy": strategy,
        "block_size": block_size, "machine": Machine() if machine is None else machine,
        "shape": shape,
    }  # fmt: skip
    comm = communicator(group)
    plans: Plan | dict[str, Plan] = finish(start_planning(lambda: mask_mod, comm, request), comm)
    return plans


@outside_inference_mode
def start_planning(
    mask_mod: Callable[[], MaskFunction | Mapping[str, MaskFunction]],
    comm: Communicator | None,
    request: Mapping[str, Any],
) -> Planning | UlyssesPlanning | FasterPlanning:
    """A plan under way; see `Planning`."""
    if comm is not None and may_deal_heads(request, comm.size):
        return FasterPlanning(mask_mod, comm, request)
    if request["strategy"] == "ulysses":
        from ringflex.parallel.ulysses import UlyssesPlanning

        return UlyssesPlanning(mask_mod, comm, request)
    return Planning(mask_mod, comm, request)


class Planning:
    """A plan under way: masks are traced and what they capture is copied at once, and `finish`,
    the collective, may run in another thread. All ranks make and finish theirs in one order.

    Args:
        mask_mod: makes what `plan` takes; its errors are told to the other ranks like any.
        part: of the heads that this process plans for.
    """

    def __init__(
        self,
        mask_mod: Callable[[], MaskFunction | Mapping[str, MaskFunction]],
        comm: Communicator | None,
        request: Mapping[str, Any],
        part: Part | None = None,
    ) -> None:
        self.comm, self.several, self.part = comm, False, part or Part()
        self.agreement = None if comm is None else comm.prepare()
        self.draft: Draft | Exception
        try:
            given = mask_mod()
            self.several = isinstance(given, Mapping)
            masks = given if isinstance(given, Mapping) else {"": given}
            world_size = comm.size if comm else 1
            self.draft = Draft(masks, Request(world_size=world_size, **request))
            self.draft.share(self.part)
        except Exception as error:  # the other ranks must hear of it where they wait for this one
            self.draft = error

    def identity(self) -> tuple[str, bytes]:
        """What all ranks must have alike; raises what was wrong."""
        if isinstance(self.draft, Exception):
            raise self.draft
        return self.draft.identity()

    def finish(self) -> Plan | dict[str, Plan]:
        """The plan, or the plans."""
        rank = self.comm.rank if self.comm else 0
        known: dict[str, Plan] | None = None
        key = b""  # of the request, before the layout is chosen

        def begin(anew: bool) -> tuple[tuple[str, bytes], Array | None]:
            nonlocal known, key
            identity = self.identity()
            key = identity[1]
            known = None if anew else recall(self.comm, key)
            if known is not None:
                return identity, None
            assert isinstance(self.draft, Draft)
            surveys = self.draft.layout is None
            rows = self.draft.survey(rank) if surveys else self.draft.needs(rank)
            return identity, rows

        told = tell(self.agreement, partial(begin, False), partial(begin, True))
        if told is None:
            assert known is not None
            return known if self.several else known[""]
        draft = self.draft
        assert isinstance(draft, Draft)
        if draft.layout is None:
            told = tell(self.agreement, partial(draft.settle, rank, told))
            assert told is not None
        draft.hear(told)
        plans = draft.plans(rank, self.comm, self.part)
        remember(self.comm, key, plans)
        return plans if self.several else plans[""]


@outside_inference_mode
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
    machine: Machine | None = None,
    shape: AttentionShape | None = None,
) -> list[Plan]:
    """The plans of all ranks in one process, with no process group: for tests and simulation.

    Arguments as in `plan`, but for one mask. The plans cannot run on several ranks: they have no
    communicator.
    """
    request = {
        "seq_len": seq_len, "B": B, "H": H, "layout": layout, "strategy": strategy,
        "block_size": block_size, "machine": Machine() if machine is None else machine,
        "shape": shape,
    }  # fmt: skip
    found = _plan_all(mask_mod, world_size, request)
    if may_deal_heads(request, world_size):
        dealt = _plan_all(mask_mod, world_size, {**request, "strategy": "ulysses"})
        if is_faster(dealt[:1], found[:1], request):
            return dealt
    return found


def _plan_all(mask_mod: MaskFunction, world_size: int, request: Mapping[str, Any]) -> list[Plan]:
    if request["strategy"] == "ulysses":
        from ringflex.parallel import ulysses

        return ulysses.plan_all(mask_mod, world_size, request)
    draft = Draft({"": mask_mod}, Request(**request, world_size=world_size))
    draft.prepare(range(world_size))
    return [draft.plans(rank, None)[""] for rank in range(world_size)]


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
        told = [need_rows([block_mask], layout)]
        needs, work = needs_of(told, 0, block_mask.B, block_mask.kv_blocks)
        block_mask.cache["plan"] = {
            "layout": layout,
            "outline": Outline(Reads(layout, needs, Costs.of(Machine(), layout.block_size)), work),
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


def tell(
    comm: Agreement | None,
    make: Callable[[], tuple[tuple[str, bytes], Array | None]],
    again: Callable[[], tuple[tuple[str, bytes], Array | None]] | None = None,
) -> list[Array] | None:
    """The rows of all ranks; None if no rank has any to tell. What goes wrong on one is raised on
    all, where they wait for it.

    Args:
        make: what all ranks must have alike, in words and bytes, and this rank's rows, int64; None
            if it knows all that follows.
        again: the same, where others do not.
    """
    alone = comm is None or comm.size == 1
    identity, error = ("", b""), None
    rows: Array | None = np.zeros((0, 1), dtype=np.int64)
    try:
        identity, rows = make()
    except Exception as problem:
        if alone:
            raise
        error = problem
    if comm is None or alone:
        return None if rows is None else [rows]
    counts = comm.agree(*identity, error, count=0 if rows is None else 1 + rows.shape[0])
    if not all(counts):
        return tell(comm, again) if again is not None and any(counts) else None
    assert rows is not None
    return comm.all_gather_rows(rows, [count - 1 for count in counts])
