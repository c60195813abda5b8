"""Strategy "ulysses": heads are dealt to the GPUs of a node, the sequence to nodes.

Within a node all-to-alls give each GPU all of the node's tokens for its share of the heads, and
back (Jacobs et al., "DeepSpeed Ulysses", 2023). Between nodes K/V moves as any plan says, for each
share of the heads on its own; so a plan's ranks are nodes here (as in Fang and Zhao, "USP: A
Unified Sequence Parallelism Approach", 2024).

Legend: W ranks, G of them to a node, N = W / G nodes; rank r is GPU r % G of node r // G.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringflex.kernels.contract import KernelOptions, compute_dtype
from ringflex.masks.runs import Array
from ringflex.masks.trace_cache import traced_score
from ringflex.masks.traced_mod import TracedMod
from ringflex.parallel import autograd
from ringflex.parallel.comm import Agreement, Communicator, Exchange
from ringflex.parallel.draft import Draft, MaskFunction, Part, Request
from ringflex.parallel.layout import Layout
from ringflex.parallel.machine import AttentionShape, Machine
from ringflex.parallel.plan import Plan, PlanStats, swapped_bytes
from ringflex.parallel.planner import Planning, tell

NAME = "ulysses"


def request_of_nodes(request: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """The request of a plan whose ranks are nodes, from one whose ranks are GPUs.

    Raises:
        ValueError: nodes are not whole, or a layout is given that is not a name.
    """
    machine, layout = request["machine"], request["layout"]
    if not isinstance(machine, Machine):
        raise TypeError(f"machine must be an rf.Machine, got {type(machine).__name__}")
    gpus = min(machine.gpus_per_node, world_size)
    if world_size % gpus:
        raise ValueError(
            f"strategy='{NAME}' wants whole nodes: {world_size} ranks are not a multiple of {gpus} "
            "GPUs per node; pass machine=rf.Machine(gpus_per_node=...)"
        )
    if isinstance(layout, Layout):
        raise ValueError(f"strategy='{NAME}' makes its own layout: pass one by name, not a Layout")
    if request["H"] is not None and request["H"] % gpus:
        raise ValueError(
            f"strategy='{NAME}' deals heads to the {gpus} GPUs of a node: H={request['H']} is not "
            "a multiple"
        )
    shape = request["shape"]
    if isinstance(shape, AttentionShape):
        shape = shape.share(gpus)
    return {
        **request, "world_size": world_size // gpus, "strategy": "auto", "multiple": gpus,
        "machine": replace(machine, gpus_per_node=1), "shape": shape,
    }  # fmt: skip


class UlyssesPlanning:
    """As `Planning`, by which the plan of nodes is made on all GPUs of a node alike."""

    def __init__(
        self,
        mask_mod: Callable[[], MaskFunction | Mapping[str, MaskFunction]],
        comm: Communicator | None,
        request: Mapping[str, Any],
    ) -> None:
        self.rank, self.size = (comm.rank, comm.size) if comm else (0, 1)
        self.comm, self.agreement = comm, None if comm is None else comm.prepare()
        given, error = dict(request), None
        try:
            given = request_of_nodes(request, self.size)
        except Exception as problem:
            error = problem
        gpus = given.get("multiple", 1)
        given.pop("world_size", None)

        def masks() -> MaskFunction | Mapping[str, MaskFunction]:
            if error is not None:
                raise error
            return mask_mod()

        nodes = None
        if comm is not None:
            assert self.agreement is not None
            nodes = NodeCommunicator(comm, self.agreement, gpus)
        self.planning = Planning(masks, nodes, given, Part(self.rank % gpus, gpus))

    def finish(self) -> Plan | dict[str, Plan]:
        planning = self.planning
        if planning.agreement is not None and planning.agreement.size == 1:
            # Of one node: there is nothing to agree on between nodes, but among its GPUs.
            tell(self.agreement, lambda: (planning.identity(), np.zeros((0, 3), dtype=np.int64)))
        plans = planning.finish()
        if isinstance(plans, Plan):
            return plan_of(plans, self.rank, self.size, self.comm)
        return {name: plan_of(p, self.rank, self.size, self.comm) for name, p in plans.items()}


def plan_all(mask_mod: MaskFunction, world_size: int, request: Mapping[str, Any]) -> list[Plan]:
    """The plans of all ranks, without communicators."""
    of_nodes = Request(**request_of_nodes(request, world_size))
    draft, nodes = Draft({"": mask_mod}, of_nodes), range(of_nodes.world_size)
    draft.prepare(nodes)
    parts = [Part(place, of_nodes.multiple) for place in range(of_nodes.multiple)]
    plans = [draft.plans(node, None, part)[""] for node in nodes for part in parts]
    return [plan_of(plan, rank, world_size, None) for rank, plan in enumerate(plans)]


def plan_of(nodes: Plan, rank: int, world_size: int, comm: Communicator | None) -> Plan:
    """A rank's plan, from that of its node for its share of the heads."""
    gpus = world_size // nodes.world_size
    layout = nodes.layout
    owner = np.empty_like(layout.owner)
    for node in range(nodes.world_size):
        blocks = layout.blocks_of(node)
        owner[blocks] = node * gpus + np.arange(blocks.size) // (blocks.size // gpus)
    stats = nodes.stats
    fields = {name: getattr(stats, name) for name in PlanStats.__dataclass_fields__}
    fields["work"] = tuple(np.repeat(stats.work, gpus).tolist())
    return replace(
        nodes,
        rank=rank,
        world_size=world_size,
        layout=replace(layout, world_size=world_size, owner=owner),
        strategy=NAME,
        stats=UlyssesStats(**fields, gpus=gpus, local_len=layout.local_len // gpus),
        identity=f"{nodes.identity} {NAME} {gpus}",
        comm=comm,
        nodes=nodes,
        cache={},
    )


@dataclass(frozen=True, kw_only=True)
class UlyssesStats(PlanStats):
    """Blocks are those that move between nodes, of a share of the heads; `work` and `skipped` are
    between nodes, too. Bytes count the all-to-alls as well, so they depend on `heads`.

    Attributes:
        gpus: of a node.
        local_len: token slots of a rank.
    """

    gpus: int
    local_len: int

    def _bytes(self, *blocks: Any, heads: int | None = None, **shape: Any) -> int:
        if heads is None:
            raise TypeError(f"with strategy='{NAME}' bytes depend on the query heads: pass heads=")
        kv_heads = shape["kv_heads"] // self.gpus
        between: int = super()._bytes(*blocks, heads=heads, **{**shape, "kv_heads": kv_heads})
        slots = shape["batch"] * self.local_len * (self.gpus - 1)
        dims = shape["head_dim"], shape["v_head_dim"]
        swapped = swapped_bytes(slots, heads // self.gpus, kv_heads, *dims, shape["dtype"])
        return between + sum(swapped) * (2 if shape.get("backward") else 1)


class NodeCommunicator(Communicator):
    """Of the ranks that have one place in all nodes, as if they were nodes. Bytes are counted by
    the communicator of all."""

    def __init__(self, parent: Communicator, agreement: Agreement, gpus: int) -> None:
        self.parent, self.gpus, self.place = parent, gpus, parent.rank % gpus
        self.group, self.on_gpu = parent.group, parent.on_gpu
        self.rank, self.size = parent.rank // gpus, parent.size // gpus
        self._agreement = agreement

    def prepare(self) -> Agreement:
        return _NodeAgreement(self._agreement, self.gpus)

    def exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        *,
        name: str = "tensors",
        step: int = 0,
    ) -> Exchange:
        there = [[(p * self.gpus + self.place, x) for p, x in some] for some in (sends, receives)]
        return self.parent.exchange(*there, name=name, step=step)


class _NodeAgreement(Agreement):
    """All ranks agree, and tell alike what they know of their node."""

    def __init__(self, parent: Agreement, gpus: int) -> None:
        self.parent, self.gpus, self.place = parent, gpus, parent.rank % gpus
        self.rank, self.size = parent.rank // gpus, parent.size // gpus
        self.on_gpu = parent.on_gpu

    def agree(
        self, what: str, digest: bytes, error: BaseException | None = None, count: int = 0
    ) -> list[int]:
        return self.parent.agree(what, digest, error, count)[self.place :: self.gpus]

    def all_gather_rows(self, rows: Array, counts: list[int]) -> list[Array]:
        every = np.repeat(counts, self.gpus).tolist()
        return self.parent.all_gather_rows(rows, every)[self.place :: self.gpus]


def attention(
    plan: Plan,
    kernel: ModuleType,
    score_mod: Callable[..., Tensor] | None,
    score: TracedMod | None,
    scale: float,
    options: KernelOptions,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `autograd.attention`, of a plan with `nodes`. score_mod: what `score` is the trace of."""
    nodes = plan.nodes
    assert nodes is not None
    gpus, place = plan.gpus_per_node, plan.rank % plan.gpus_per_node
    if gpus == 1:
        return autograd.attention(nodes, kernel, score, scale, options, q, k, v, sinks)
    heads = q.shape[1] // gpus
    if score is not None and score_mod is not None and "h" in score.uses:
        key = "first head", heads, q.device
        if key not in plan.cache:  # which waits for the GPU
            plan.cache[key] = torch.tensor(place * heads, device=q.device)
        first = plan.cache[key]
        score = traced_score(_of_share(score_mod, first), compute_dtype(q.dtype))
    if sinks is not None:
        sinks = sinks[place * heads : (place + 1) * heads]
    q, k, v = _Swap.apply(plan, 1, 2, q, k, v)
    out, lse = autograd.attention(nodes, kernel, score, scale, options, q, k, v, sinks)
    out, lse = _Swap.apply(plan, 2, 1, out, lse)
    return out, lse


def _of_share(score_mod: Callable[..., Tensor], first: Tensor) -> Callable[..., Tensor]:
    """A score mod for heads from `first` on, which are counted from 0."""
    return lambda score, b, h, q_idx, kv_idx: score_mod(score, b, h + first, q_idx, kv_idx)


class _Swap(torch.autograd.Function):
    """`[B, H, slots, ...]` of each tensor, one of whose dims (`take`: 1 or 2) is dealt to the GPUs
    of a node in equal parts; what comes is laid together in the other (`give`)."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, take: int, give: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.take, ctx.give = plan, take, give
        return _swap(plan, take, give, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, None, *_swap(ctx.plan, ctx.give, ctx.take, grads)


def _swap(plan: Plan, take: int, give: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    assert plan.comm is not None
    gpus = plan.gpus_per_node
    place, first = plan.rank % gpus, plan.rank // gpus * gpus
    parts = [[part.contiguous() for part in x.chunk(gpus, take)] for x in tensors]
    come = [[part if g == place else torch.empty_like(part) for g, part in enumerate(mine)]
            for mine in parts]  # fmt: skip
    others = [g for g in range(gpus) if g != place]
    plan.comm.exchange(
        [(first + g, mine[g]) for g in others for mine in parts],
        [(first + g, theirs[g]) for g in others for theirs in come],
        name="heads",
    ).wait()
    return tuple(torch.cat(theirs, give) for theirs in come)
