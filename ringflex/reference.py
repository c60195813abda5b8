"""The dense oracle: what attention with a mask and a score mod *means*, in plain PyTorch.

Quadratic in memory; for tests, at any dtype up to fp64 and on any device. The mods run as they are
written, mapped over all indices by `torch.vmap` as FlexAttention's eager path does; nothing of the
tracer, the block masks or the kernels is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ringflex.masks.trace import IndexByTensor


class Reference(NamedTuple):
    """Results of `reference_attention_with_gradients`; gradients are None where not asked for."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor | None
    dcaptures: tuple[Tensor, ...]


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask_mod: Callable[..., Tensor] | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention; differentiable in everything.

    `out = softmax(score_mod(scale * q k^T)) v` over visible keys (Dong et al., "Flex Attention",
    2024, section 3); a row that sees nothing has `out = 0`, `lse = -inf`, and zero gradients.

    Args:
        query: `[B, Hq, Sq, D]`. key: `[B, Hkv, Skv, D]`. value: `[B, Hkv, Skv, Dv]`; `Hq` is a
            multiple of `Hkv`.
        mask_mod, score_mod: as in `flex_attention`.
        scale: default `1 / sqrt(D)`.
        sinks: `[Hq]`, a logit per head that takes part in the softmax without a value.

    Returns:
        `(out [B, Hq, Sq, Dv], lse [B, Hq, Sq])`, lse in natural log.
    """
    B, Hq, q_len, D = query.shape
    groups, kv_len = Hq // key.shape[1], key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * (1 / math.sqrt(D) if scale is None else scale)
    axes = [torch.arange(n, device=query.device) for n in (B, Hq, q_len, kv_len)]
    if score_mod is not None:
        scores = _map(score_mod, axes, scores)
    if mask_mod is not None:
        scores = scores.masked_fill(~_map(mask_mod, axes), -torch.inf)
    logits = scores
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(B, Hq, q_len, 1)
        logits = torch.cat([scores, column], dim=-1)
    empty = (logits == -torch.inf).all(dim=-1, keepdim=True)
    safe = logits.masked_fill(empty, 0)  # keeps NaN out of the gradients of empty rows
    lse = safe.logsumexp(dim=-1).masked_fill(empty.squeeze(-1), -torch.inf)
    weights = safe.softmax(dim=-1).masked_fill(empty, 0)[..., :kv_len]
    return weights @ value, lse


def reference_attention_with_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dout: Tensor,
    *,
    dlse: Tensor | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    captures: Sequence[Tensor] = (),
) -> Reference:
    """`reference_attention`, and the gradients of `sum(out * dout) + sum(lse * dlse)`.

    Args:
        dout: `[B, Hq, Sq, Dv]`. dlse: `[B, Hq, Sq]` or None.
        captures: tensors that `score_mod` captures and that require a gradient.

    Returns:
        A `Reference`; gradients have the dtype of the inputs.
    """
    q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
    s = None if sinks is None else sinks.detach().requires_grad_()
    out, lse = reference_attention(
        q, k, v, mask_mod=mask_mod, score_mod=score_mod, scale=scale, sinks=s
    )
    loss = (out * dout).sum()
    if dlse is not None:
        loss = loss + (lse * dlse).masked_fill(lse == -torch.inf, 0).sum()
    wanted = [q, k, v, *captures] + ([] if s is None else [s])
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
    dsinks = None if s is None else grads.pop()
    dq, dk, dv, *dcaptures = grads
    return Reference(out.detach(), lse.detach(), dq, dk, dv, dsinks, tuple(dcaptures))


def _map(fn: Callable[..., Tensor], axes: list[Tensor], scores: Tensor | None = None) -> Tensor:
    """`fn` over all of `[B, H, Sq, Skv]`."""
    score_dims = () if scores is None else (0,)
    for axis in (3, 2, 1, 0):
        index_dims = tuple(0 if i == axis else None for i in range(4))
        fn = torch.vmap(fn, in_dims=(*score_dims, *index_dims))
    with IndexByTensor():
        result: Tensor = fn(*(() if scores is None else (scores,)), *axes)
    return result.expand(tuple(axis.numel() for axis in axes))
