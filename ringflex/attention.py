"""flex_attention(): validate, pick a kernel, run the plan."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

from ringflex import validation as check
from ringflex.kernels.contract import KernelOptions, compute_dtype
from ringflex.kernels.select import Selection, select
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.builder import create_block_mask
from ringflex.masks.from_torch import from_torch
from ringflex.masks.mods import full
from ringflex.masks.trace_cache import traced_score
from ringflex.masks.traced_mod import TracedMod
from ringflex.modes import outside_compiled_code, outside_inference_mode
from ringflex.parallel import ulysses
from ringflex.parallel.autograd import attention
from ringflex.parallel.plan import Plan
from ringflex.parallel.planner import single_device_plan


@outside_compiled_code
@outside_inference_mode
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: BlockMask | TorchBlockMask | Plan | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """Attention with any mask and score function, on one device or over a sharded sequence.

    `torch.nn.attention.flex_attention.flex_attention`'s signature (Dong et al., "Flex Attention",
    2024). With a `Plan`, the tensors are this rank's shards in the plan's layout, every rank of the
    plan's group calls it, and the mods still see global indices.

    >>> out = rf.flex_attention(q, k, v, score_mod=rf.softcap(30.0), block_mask=plan)

    Args:
        query: `[B, Hq, Sq, D]`; bf16, fp16, fp32 or fp64; any strides.
        key: `[B, Hkv, Skv, D]`. value: `[B, Hkv, Skv, Dv]`. Without a plan, both may have a batch
            size of 1, as paged caches have: all sequences of the batch share them.
        score_mod: `score_mod(score, b, h, q_idx, kv_idx) -> score`; tensors that it captures get
            gradients. It is traced once for the same code and kind of captured values.
        block_mask: ringflex's or torch's BlockMask, a `Plan`, or None: everything is visible.
        scale: factor of the scores, default `1 / sqrt(D)`.
        enable_gqa: allow `Hq` to be a multiple of `Hkv`.
        return_lse: return `(out, lse)`.
        kernel_options: a dict of `ringflex.kernels.contract.KernelOptions`: deterministic,
            backward, gradient_dtype, approximate_tanh, tune, tiles, tma.
        return_aux: torch's `AuxRequest`; `lse` can be had, `max_scores` cannot.
        sinks: `[Hq]`, a learned logit per head that takes part in the softmax without a value.
        backend: "auto" (the fastest that serves: "hopper" on Hopper GPUs, "triton" on GPUs, "eager"
            on CPUs), or one of these.

    Returns:
        `out [B, Hq, Sq, Dv]` in the query's dtype; with `return_lse` also `lse [B, Hq, Sq]`,
        natural log, fp32 (fp64 for fp64 inputs). A row that sees nothing has `out = 0` and
        `lse = -inf`. With `return_aux`, `(out, AuxOutput)`. All are differentiable. With a plan,
        the gradients of captured tensors and sinks are this rank's share: their sum over the group
        is the whole.

    Raises:
        TypeError, ValueError, NotImplementedError: on every rank, before the first transfer.
    """
    if not isinstance(block_mask, Plan):
        key, value = _of_all_sequences(query, key, value)
    comm = block_mask.comm if isinstance(block_mask, Plan) and block_mask.world_size > 1 else None
    error: Exception | None = None
    try:
        options = KernelOptions.of(kernel_options)
        plan, score, resolved_scale, chosen = _resolve(
            query, key, value, score_mod, block_mask, scale, enable_gqa, return_lse,
            return_aux, sinks, backend,
        )  # fmt: skip
    except Exception as problem:  # the other ranks must hear of it where they wait for this one
        if comm is None:
            raise
        error = problem
    if comm is not None:
        assert isinstance(block_mask, Plan)
        identity = ""
        if error is None:
            identity = _identity(plan, query, key, value, score, resolved_scale, sinks)
            identity += f", backend {chosen.name}, {options}"
        # On GPUs reading the answer would stall the stream: ask once for each kind of call.
        if error or not comm.on_gpu or identity not in block_mask.cache:
            comm.agree(identity, hashlib.blake2b(identity.encode(), digest_size=16).digest(), error)
            block_mask.cache[identity] = True
    given = (resolved_scale, options, query, key, value, sinks)
    if plan.nodes is not None:
        out, lse = ulysses.attention(plan, chosen.kernel, score_mod, score, *given)
    else:
        out, lse = attention(plan, chosen.kernel, score, *given)
    if return_aux is not None:
        return out, AuxOutput(lse=lse if return_aux.lse else None)
    return (out, lse) if return_lse else out


def _of_all_sequences(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value, viewed for each sequence of the batch if all share them."""
    if not all(isinstance(x, Tensor) and x.ndim == 4 for x in (query, key, value)):
        return key, value  # to be refused
    if not key.shape[0] == value.shape[0] == 1 < query.shape[0]:
        return key, value
    return key.expand(query.shape[0], -1, -1, -1), value.expand(query.shape[0], -1, -1, -1)


@functools.lru_cache(maxsize=64)
def _everything(q_len: int, kv_len: int) -> BlockMask:
    """The block mask of no mask."""
    return create_block_mask(full(), None, None, q_len, kv_len)


def _resolve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None,
    block_mask: BlockMask | TorchBlockMask | Plan | None,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    return_aux: AuxRequest | None,
    sinks: Tensor | None,
    backend: str,
) -> tuple[Plan, TracedMod | None, float, Selection]:
    """Checked arguments: the plan to run, the traced score mod, the scale, the kernel."""
    check.check_tensors(query, key, value, enable_gqa=enable_gqa)
    if return_aux is not None and return_lse:
        raise ValueError("pass return_lse or return_aux, not both")
    if return_aux is not None and return_aux.max_scores:
        raise NotImplementedError("return_aux with max_scores is not supported; lse is")
    if sinks is not None:
        check.check_sinks(sinks, query)
    if block_mask is None:
        block_mask = _everything(query.shape[2], key.shape[2])
    elif isinstance(block_mask, TorchBlockMask):
        block_mask = from_torch(block_mask)
    if isinstance(block_mask, Plan):
        check.check_plan_fits(block_mask, query, key)
        plan = block_mask
    elif isinstance(block_mask, BlockMask):
        check.check_mask_fits(block_mask, query, key)
        plan = single_device_plan(block_mask)
    else:
        raise TypeError(
            "block_mask must be a BlockMask (rf.create_block_mask or torch's), a Plan (rf.plan) or "
            f"None, got {type(block_mask).__name__}"
            + (": pass a mask_mod through rf.create_block_mask" if callable(block_mask) else "")
        )
    score = None
    if score_mod is not None:
        score = traced_score(score_mod, compute_dtype(query.dtype))
        check.check_score(score, query)
        check.check_score_reads(score, plan, query)
    leaves = (query, key, value, sinks, *(score.captures if score else ()))
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    chosen = select(backend, query, value, plan.rows, score, training)
    return plan, score, check.resolve_scale(scale, query.shape[3]), chosen


def _identity(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: TracedMod | None,
    scale: float,
    sinks: Tensor | None,
) -> str:
    """What must be equal on all ranks, in words. Values of captured tensors are not compared."""
    mod = "None"
    if score is not None:
        code = hashlib.blake2b(score.module.code.encode(), digest_size=8).hexdigest()
        captured = [(tuple(c.shape), str(c.dtype), c.requires_grad) for c in score.captures]
        mod = f"{score.name} {code} {captured}"
    return (
        f"flex_attention(query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}, "
        f"{q.dtype}, scale={scale}, score_mod={mod}, sinks="
        f"{None if sinks is None else sinks.requires_grad}, "
        f"gradients={torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))}, "
        f"plan {plan.identity})"
    )
