"""Plan: the global block mask, sharded by sequence, with the schedule that serves it.

Pure data, but for `unshard`, which needs the communicator that the plan was made with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ringflex.kernels.contract import compute_dtype
from ringflex.masks.block_mask import BlockMask
from ringflex.parallel.layout import Layout
from ringflex.parallel.machine import AttentionShape, Machine
from ringflex.parallel.needs import Needs, Reads, Work
from ringflex.parallel.steps import Step

if TYPE_CHECKING:
    from ringflex.parallel.comm import Communicator
    from ringflex.parallel.predict import Prediction


@dataclass(frozen=True, kw_only=True)
class PlanStats:
    """What a plan computes and moves. Blocks count per batch element that the mask distinguishes
    (once if it does not).

    Attributes:
        work: visible blocks that each rank computes, `[W]`, over the mask's batch and heads.
        blocks_received, blocks_sent: K/V blocks of this rank, per step (the first is local).
        gradient_blocks_received, gradient_blocks_sent: dK/dV blocks in the backward, per step.
        remote_blocks: K/V blocks that other ranks hold.
        block_size: tokens per block.
        batch_groups: batch elements that the mask distinguishes.
    """

    work: tuple[int, ...]
    blocks_received: tuple[int, ...]
    blocks_sent: tuple[int, ...]
    gradient_blocks_received: tuple[int, ...]
    gradient_blocks_sent: tuple[int, ...]
    remote_blocks: int
    block_size: int
    batch_groups: int

    @property
    def skipped(self) -> float:
        """Share of the other ranks' K/V that never comes to this rank, 0 to 1."""
        if not self.remote_blocks:
            return 0.0
        return 1 - sum(self.blocks_received) / self.remote_blocks

    @property
    def imbalance(self) -> float:
        """Work of the slowest rank over the mean; 1 is perfect."""
        return max(self.work) * len(self.work) / max(1, sum(self.work))

    def bytes_received(self, **shape: Any) -> int:
        """Bytes that come to this rank; arguments as `bytes_sent`."""
        return self._bytes(self.blocks_received, self.gradient_blocks_received, **shape)

    def bytes_sent(self, **shape: Any) -> int:
        """Bytes that leave this rank in one attention layer.

        Args (keywords):
            batch, kv_heads, head_dim: of the K tensor.
            v_head_dim: of the V tensor.
            heads: of the query; needed with strategy="ulysses" only.
            dtype: of K and V.
            backward: count the backward as well: K/V again, and dK/dV.
            gradient_dtype: of dK/dV on their way; by default that of accumulation.
        """
        return self._bytes(self.blocks_sent, self.gradient_blocks_sent, **shape)

    def _bytes(
        self,
        kv_blocks: tuple[int, ...],
        gradient_blocks: tuple[int, ...],
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        dtype: torch.dtype,
        backward: bool = False,
        gradient_dtype: torch.dtype | None = None,
        heads: int | None = None,
    ) -> int:
        elements = self.block_size * kv_heads * (head_dim + v_head_dim) * batch // self.batch_groups
        total = sum(kv_blocks) * dtype.itemsize * (2 if backward else 1)
        if backward:
            total += sum(gradient_blocks) * (gradient_dtype or compute_dtype(dtype)).itemsize
        return total * elements


class Outline(NamedTuple):
    """What a rank knows of all: who reads what of whom, and what each computes of it."""

    reads: Reads
    work: Work


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """One rank's part of attention over a sharded sequence.

    Attributes:
        rank, world_size: within the plan's group.
        layout: who holds which blocks.
        strategy: "ring", "direct", "hierarchical", "all_gather" or "ulysses".
        rows: block mask of this rank's queries against the whole sequence.
        steps: the local step, then one per arrival.
        outline: who reads what of whom, on all ranks.
        stats: what it computes and moves.
        identity: what all ranks must have made alike, in words and digits.
        comm: the communicator; None in plans made without a process group.
        nodes: with "ulysses", the plan whose ranks are nodes, for this GPU's share of the heads;
            what this plan has of `rows` and `steps` is that one's.
    """

    rank: int
    world_size: int
    layout: Layout
    strategy: str
    rows: BlockMask
    steps: tuple[Step, ...]
    outline: Outline
    stats: PlanStats
    identity: str
    comm: Communicator | None = field(default=None, repr=False)
    nodes: Plan | None = field(default=None, repr=False)
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def seq_len(self) -> int:
        """True tokens of the whole sequence."""
        return self.layout.seq_len

    @property
    def gpus_per_node(self) -> int:
        """Among which "ulysses" deals the heads; 1 with other strategies."""
        return 1 if self.nodes is None else self.world_size // self.nodes.world_size

    @property
    def has_transfers(self) -> bool:
        """Whether there is more than the local step; the same on every rank."""
        return len(self.steps) > 1

    @property
    def needs(self) -> Needs:
        """Which K/V blocks each rank's queries see."""
        return self.outline.reads.needs

    @property
    def local_len(self) -> int:
        """Token slots on this rank, padding included; the same on every rank."""
        return self.layout.local_len

    @property
    def positions(self) -> Tensor:
        """Global position of each local slot, int64 `[local_len]`, CPU; for RoPE and the like."""
        return torch.from_numpy(self.layout.positions_of(self.rank))

    @property
    def valid(self) -> Tensor:
        """bool `[local_len]`, CPU; False where a slot is padding."""
        return self.positions < self.seq_len

    def __copy__(self) -> Plan:
        return self

    def __deepcopy__(self, memo: Any) -> Plan:
        """Itself, which does not change: so a module that holds it can be copied."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a Plan cannot be pickled: make it with rf.plan on each rank")

    def shard(self, x: Tensor, dim: int, fill: float = 0) -> Tensor:
        """This rank's slots of a tensor that holds the whole sequence; differentiable.

        Args:
            x: `seq_len` long in `dim`.
            dim: the sequence dimension.
            fill: what padding slots get.

        Returns:
            `x` with `local_len` slots in `dim`.

        Raises:
            ValueError: another length, or a fill that the dtype does not have.
        """
        if not (x.is_floating_point() or x.is_complex() or float(fill).is_integer()):
            raise ValueError(f"shard(fill={fill}) of a tensor of {x.dtype}")
        if not -x.ndim <= dim < x.ndim or x.shape[dim] != self.seq_len:
            raise ValueError(
                f"shard(x, dim={dim}) wants the whole sequence, {self.seq_len} tokens in that "
                f"dimension; got shape {tuple(x.shape)}"
            )
        positions, valid = self.positions.to(x.device), self.valid.to(x.device)
        local = x.index_select(dim, positions.clamp(max=self.seq_len - 1))
        if bool((self.positions < self.seq_len).all()):
            return local
        shape = [1] * x.ndim
        shape[dim] = -1
        return local.masked_fill(~valid.view(shape), fill)

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """The whole sequence from every rank's slots; a collective, differentiable.

        The gradient of a rank's slots is the sum over ranks of the gradients of the whole.

        Args:
            x: `local_len` slots in `dim`, the same shape on every rank.
            dim: the sequence dimension.

        Returns:
            `x` with `seq_len` tokens in `dim`, on every rank.

        Raises:
            ValueError: another length, or a plan of several ranks without a process group.
        """
        from ringflex.parallel.autograd import unshard

        if not -x.ndim <= dim < x.ndim or x.shape[dim] != self.local_len:
            raise ValueError(
                f"unshard(x, dim={dim}) wants this rank's {self.local_len} slots in that "
                f"dimension; got shape {tuple(x.shape)}"
            )
        return unshard(self, x, dim % x.ndim)

    def describe(self) -> str:
        """What this rank holds, computes and moves, as text."""
        s = self.stats
        lines = [
            f"rank {self.rank} of {self.world_size}: {self.seq_len} tokens, layout "
            f"{self.layout.name}, strategy {self.strategy}, blocks of {self.layout.block_size}",
            f"work {s.work[self.rank]} visible blocks, slowest rank {s.imbalance:.2f}x the mean; "
            f"{s.skipped:.1%} of remote K/V never received",
        ]
        if self.nodes is not None:
            lines.append(
                f"heads in {self.gpus_per_node} parts among the GPUs of a node; between "
                f"{self.nodes.world_size} nodes, {self.nodes.strategy}:"
            )
        for i, step in enumerate(self.steps):
            blocks = step.mask.visible_blocks if step.mask else 0
            moves = ", ".join(
                f"{t.count} {verb} {t.peer}"
                for verb, transfers in (("from", step.receives), ("to", step.sends))
                for t in transfers
            )
            lines.append(f"step {i}: computes {blocks} blocks" + (f"; K/V {moves}" * bool(moves)))
        return "\n".join(lines)

    def predict(
        self, shape: AttentionShape | None = None, machine: Machine | None = None
    ) -> Prediction:
        """The time line of one attention layer on all ranks, forward and backward. No collective:
        a rank knows enough of the others.

        Args:
            shape: heads, head dims and dtype; by default 32 heads, 8 of K/V, of 128, bf16.
            machine: rates of GPUs and links; by default those of Hopper GPUs.

        Returns:
            Seconds, of the slowest rank, and what each rank does when.
        """
        from ringflex.parallel.predict import predict_all

        return predict_all(self, shape, machine)

    def plot(self, path: str) -> None:
        """Saves a picture of the plan: the mask by owner, the work, who sends to whom. With
        "ulysses" ranks are nodes there.

        path: its ending chooses the format: PNG, SVG, PDF, or HTML with the plan in words too.
        Needs matplotlib (`pip install ringflex[plots]`).
        """
        from ringflex.parallel.picture import plot_plan

        plot_plan(self, path)


def swapped_bytes(
    slots: int, heads: int, kv_heads: int, D: int, Dv: int, dtype: torch.dtype
) -> tuple[int, int]:
    """What "ulysses" exchanges within a node for so many token slots and a GPU's heads: q, k and v,
    or their gradients; and out and lse, or theirs."""
    size, lse = dtype.itemsize, compute_dtype(dtype).itemsize
    there = slots * (heads * D + kv_heads * (D + Dv)) * size
    return there, slots * heads * (Dv * size + lse)


def stats_of(
    layout: Layout, rank: int, steps: tuple[Step, ...], work: list[int], batch_groups: int
) -> PlanStats:
    """The statistics of one rank's steps, given every rank's work in blocks."""

    def counts(transfers: str) -> tuple[int, ...]:
        return tuple(sum(t.count for t in getattr(step, transfers)) for step in steps)

    local = int((layout.blocks_of(rank) < layout.real_blocks).sum())
    return PlanStats(
        work=tuple(work),
        blocks_received=counts("receives"),
        blocks_sent=counts("sends"),
        gradient_blocks_received=counts("collects"),
        gradient_blocks_sent=counts("returns"),
        remote_blocks=(layout.real_blocks - local) * batch_groups,
        block_size=layout.block_size,
        batch_groups=batch_groups,
    )
