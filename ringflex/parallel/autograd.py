"""The one torch.autograd.Function of attention, for one device and for many."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringflex.kernels.contract import KernelOptions, Partial, compute_dtype
from ringflex.masks.traced_mod import TracedMod
from ringflex.modes import without_autocast
from ringflex.parallel import schedule
from ringflex.parallel.plan import Plan


def attention(
    plan: Plan,
    kernel: ModuleType,
    score: TracedMod | None,
    scale: float,
    options: KernelOptions,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`, differentiable in q, k, v, sinks and the score mod's captured tensors."""
    captures = () if score is None else score.captures
    inputs = (q, k, v, *captures) if sinks is None else (q, k, v, sinks, *captures)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        result: tuple[Tensor, Tensor] = Attention.apply(
            plan, kernel, score, scale, options, q, k, v, sinks, *captures
        )
        return result
    return _forward(plan, kernel, score, scale, options, q, k, v, sinks, q.dtype)[3:]


def _forward(
    plan: Plan,
    kernel: ModuleType,
    score: TracedMod | None,
    scale: float,
    options: KernelOptions,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v without what their padding holds; out in `out_dtype`; lse.

    A sink is one more key without a value (Xiao et al., "Efficient Streaming Language Models with
    Attention Sinks", 2023; a learned logit per head as in gpt-oss, 2025): it enters as the result
    (out 0, lse = sink) that the first step merges into.
    """
    if _padding(plan, q.device) is not None:
        q, k, v = (_zero_padding(plan, x) for x in (q, k, v))
    out = _empty_like(q, v.shape[3], out_dtype)
    lse = torch.empty(q.shape[:3], dtype=compute_dtype(q.dtype), device=q.device)
    before = None
    if sinks is not None:
        before = Partial(None, sinks.to(lse.dtype)[None, :, None].expand_as(lse))
    with _surroundings(q):
        schedule.forward(plan, kernel, q, k, v, score, scale, before, Partial(out, lse), options)
    return q, k, v, out, lse


class Attention(torch.autograd.Function):
    """`(q, k, v, sinks, *captures) -> (out, lse)`."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        kernel: ModuleType,
        score: TracedMod | None,
        scale: float,
        options: KernelOptions,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        *captures: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # delta from a rounded out is off by a constant per row. That all but cancels in dq, dk and
        # dv, but adds up in the gradient of a bias or a slope, which sums over whole rows.
        exact = any(ctx.needs_input_grad[_FIRST_CAPTURE:])
        dtype = q.dtype
        q, k, v, out, lse = _forward(
            plan, kernel, score, scale, options, q, k, v, sinks,
            compute_dtype(dtype) if exact else dtype,
        )  # fmt: skip
        ctx.plan, ctx.kernel, ctx.score, ctx.scale, ctx.options = (
            plan, kernel, score, scale, options,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        # Captures are saved so that autograd notices if one is changed in place before backward.
        ctx.save_for_backward(q, k, v, sinks, out, lse, *captures)
        return out.to(dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, sinks, out, lse, *captures = ctx.saved_tensors
        plan, kernel, options = ctx.plan, ctx.kernel, ctx.options
        dout = torch.zeros_like(out, dtype=q.dtype) if dout is None else _zero_padding(plan, dout)
        dlse = None if dlse is None else _zero_padding(plan, dlse)
        dcaptures = [
            torch.zeros_like(c, dtype=torch.promote_types(c.dtype, torch.float32))
            if wanted
            else None
            for c, wanted in zip(captures, ctx.needs_input_grad[_FIRST_CAPTURE:], strict=True)
        ]
        with _surroundings(q):
            apart = kernel.has_separate_passes(q, v, options, plan.has_transfers)
            terms = kernel.row_terms(
                dout, out, lse, dlse, q, plan.rows, ctx.score, ctx.scale, options, apart
            )
            dq, dk, dv = schedule.backward(
                plan, kernel, dout, q, k, v, terms, ctx.score, ctx.scale, dcaptures, options
            )
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[_FIRST_CAPTURE - 1]:
            delta = terms.delta[..., : q.shape[2]]
            weight = (sinks.to(lse.dtype)[None, :, None] - lse).exp()
            weight = weight.masked_fill(lse == -torch.inf, 0)  # a sink of -inf, and nothing seen
            dsinks = -(weight * delta).sum((0, 2)).to(sinks.dtype)
        grads = (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks)
        summed = (
            None if d is None else d.to(c.dtype) for c, d in zip(captures, dcaptures, strict=True)
        )
        return (None, None, None, None, None, *grads, *summed)


_FIRST_CAPTURE = 9  # among the arguments of Attention.forward


def _surroundings(q: Tensor) -> AbstractContextManager[Any]:
    """The kernel chooses its dtypes itself, and runs where q is: Triton launches on the current
    device."""
    if q.device.type != "cuda" or q.device.index == torch.cuda.current_device():
        return without_autocast(q.device.type)
    stack = ExitStack()
    stack.enter_context(without_autocast("cuda"))
    stack.enter_context(torch.cuda.device(q.device))
    return stack


def _empty_like(q: Tensor, Dv: int, dtype: torch.dtype) -> Tensor:
    """`[B, Hq, q_len, Dv]`, with tokens before heads in memory if q has them so."""
    B, H, S, _ = q.shape
    if q.stride(1) < q.stride(2):
        return torch.empty(B, S, H, Dv, dtype=dtype, device=q.device).transpose(1, 2)
    return torch.empty(B, H, S, Dv, dtype=dtype, device=q.device)


def _zero_padding(plan: Plan, x: Tensor) -> Tensor:
    """`x [B, H, local_len, ...]` with padding slots zero: what they hold may be NaN, and a weight
    of zero would not keep it out of a sum."""
    padding = _padding(plan, x.device)
    if padding is None:
        return x
    return x.masked_fill(padding.view(1, 1, -1, *[1] * (x.ndim - 3)), 0)


def _padding(plan: Plan, device: torch.device) -> Tensor | None:
    """bool `[local_len]`: which slots are padding; None if none is."""
    if device not in plan.cache:
        # One device, any length: no slots but tokens.
        whole = plan.rows.q_len != plan.local_len or bool(plan.valid.all())
        plan.cache[device] = None if whole else (~plan.valid).to(device)
    padding: Tensor | None = plan.cache[device]
    return padding


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, dim: int) -> Tensor:
        ctx.plan, ctx.dim = plan, dim
        layout = plan.layout
        parts = [x] if plan.world_size == 1 else _comm(plan).all_gather(x)
        whole = torch.cat(parts, dim)
        positions = torch.cat(
            [torch.from_numpy(layout.positions_of(r)) for r in range(plan.world_size)]
        )
        slot_of = torch.empty_like(positions)
        slot_of[positions] = torch.arange(positions.numel(), device="cpu")
        return whole.index_select(dim, slot_of[: plan.seq_len].to(x.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        plan: Plan = ctx.plan
        if plan.world_size > 1:
            grad = _comm(plan).sum(grad.clone(memory_format=torch.contiguous_format))
        return None, plan.shard(grad, ctx.dim), None


def _comm(plan: Plan) -> Any:
    if plan.comm is None:
        raise ValueError(
            f"this plan of {plan.world_size} ranks was made without a process group (plan_all); "
            "make it with rf.plan(..., group=...) on every rank"
        )
    return plan.comm


def unshard(plan: Plan, x: Tensor, dim: int) -> Tensor:
    """See `Plan.unshard`."""
    result: Tensor = _Unshard.apply(plan, x, dim)
    return result
