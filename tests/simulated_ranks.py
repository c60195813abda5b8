"""All ranks of a plan in one process: the schedule's own code, with queues for a network.

Each rank is a thread. Forward and backward are called as `ringflex.parallel.autograd` calls them,
but not through autograd, whose backward has one thread for each GPU.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attention_cases import shard
from ringflex.kernels.contract import KernelOptions, Partial, compute_dtype
from ringflex.masks.trace import trace_score
from ringflex.parallel import schedule
from ringflex.parallel.plan import Plan
from ringflex.reference import Reference

PATIENCE = 250.0  # seconds that a rank waits for a message

_Place = tuple[int, int]  # sender, receiver
_Message = tuple[Tensor, torch.cuda.Event | None]  # and when it is written


class Network:
    """First in, first out between each two ranks."""

    def __init__(self, size: int) -> None:
        pairs = itertools.product(range(size), repeat=2)
        self.queues: dict[_Place, queue.Queue[_Message]] = {pair: queue.Queue() for pair in pairs}
        self.turn = threading.Lock()  # one rank computes at a time: Triton's interpreter is no more


class SimulatedCommunicator:
    """What a schedule needs of a `Communicator`."""

    on_gpu = False

    def __init__(self, network: Network, rank: int, size: int) -> None:
        self.network, self.rank, self.size = network, rank, size
        self.bytes_sent = self.bytes_received = 0

    def exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        *,
        name: str = "",
        step: int = 0,
    ) -> SimulatedExchange:
        for peer, x in sends:
            message = x.clone()
            sent = torch.cuda.current_stream().record_event() if x.is_cuda else None
            self.network.queues[self.rank, peer].put((message, sent))
            self.bytes_sent += x.nbytes
        self.bytes_received += sum(x.nbytes for _, x in receives)
        return SimulatedExchange(self, receives)


class SimulatedExchange:
    def __init__(self, comm: SimulatedCommunicator, receives: Sequence[tuple[int, Tensor]]) -> None:
        self.comm, self.receives = comm, receives

    def wait(self) -> None:
        network = self.comm.network
        for peer, x in self.receives:
            network.turn.release()
            try:
                message, sent = network.queues[peer, self.comm.rank].get(timeout=PATIENCE)
            finally:
                network.turn.acquire()
            if sent is not None:  # perhaps on another stream
                torch.cuda.current_stream().wait_event(sent)
                message.record_stream(torch.cuda.current_stream())
            x.copy_(message)
        self.receives = []


def run_ranks(
    plans: Sequence[Plan],
    kernel: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    *,
    sinks: Tensor | None = None,
    options: KernelOptions | None = None,
) -> Reference:
    """Attention of the whole sequence, computed by ranks; gradients of captures are sums.

    Args:
        plans: of all ranks, from `rf.plan_all`.
        q, k, v, dout: of the whole sequence, `[B, H, S, D]`.
    """
    options = options or KernelOptions()
    size = len(plans)
    network = Network(size)
    parts: list[Any] = [None] * size
    score = None if score_mod is None else trace_score(score_mod, compute_dtype(q.dtype))

    def one_rank(rank: int) -> None:
        network.turn.acquire()
        try:
            comm: Any = SimulatedCommunicator(network, rank, size)
            plan = replace(plans[rank], comm=comm)
            local = [shard(plan, x) for x in (q, k, v, dout)]
            parts[rank] = _attend(plan, kernel, *local, score, sinks, options)
            kinds = {"backward": True, "gradient_dtype": options.gradient_dtype}
            shape: dict[str, Any] = {
                "batch": q.shape[0], "kv_heads": k.shape[1], "head_dim": k.shape[3],
                "v_head_dim": v.shape[3], "dtype": k.dtype, **kinds,
            }  # fmt: skip
            assert comm.bytes_received == plan.stats.bytes_received(**shape)
            assert comm.bytes_sent == plan.stats.bytes_sent(**shape)
        except BaseException as error:
            parts[rank] = error
        finally:
            network.turn.release()

    threads = [threading.Thread(target=one_rank, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for part in parts:
        if isinstance(part, BaseException):
            raise part
    whole = [_gather(plans, [part[i] for part in parts]) for i in range(5)]
    shares = zip(*(part[5] for part in parts), strict=True)
    return Reference(*whole, None, tuple(torch.stack(share).sum(0) for share in shares))


def _attend(
    plan: Plan,
    kernel: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    score: Any,
    sinks: Tensor | None,
    options: KernelOptions,
) -> tuple[Any, ...]:
    scale, compute = q.shape[3] ** -0.5, compute_dtype(q.dtype)
    captures = () if score is None else score.captures
    dcaptures = [torch.zeros_like(c) if c.requires_grad else None for c in captures]
    exact = any(c.requires_grad for c in captures)
    with torch.no_grad():
        out = q.new_empty(*q.shape[:3], v.shape[3], dtype=compute if exact else q.dtype)
        lse = q.new_empty(q.shape[:3], dtype=compute)
        before = (
            None if sinks is None else Partial(None, sinks.to(lse)[None, :, None].expand_as(lse))
        )
        after = Partial(out, lse)
        schedule.forward(plan, kernel, q, k, v, score, scale, before, after, options)
        apart = kernel.has_separate_passes(q, v, options, plan.has_transfers)
        terms = kernel.row_terms(dout, out, lse, None, q, plan.rows, score, scale, options, apart)
        dq, dk, dv = schedule.backward(
            plan, kernel, dout, q, k, v, terms, score, scale, dcaptures, options
        )
    shares = [d for d in dcaptures if d is not None]
    return out.to(q.dtype), lse, dq, dk.to(k.dtype), dv.to(v.dtype), shares


def _gather(plans: Sequence[Plan], parts: Sequence[Tensor]) -> Tensor:
    """The whole sequence of what each rank has."""
    whole = torch.cat(parts, 2)
    positions = torch.cat([plan.positions for plan in plans])
    slot_of = torch.empty_like(positions)
    slot_of[positions] = torch.arange(positions.numel())
    return whole.index_select(2, slot_of[: plans[0].seq_len].to(whole.device))
