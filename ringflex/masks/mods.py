"""Mask and score factories: what a query may see, and how its scores are changed.

A *mask mod* is any function `mask_mod(b, h, q_idx, kv_idx) -> bool tensor`; a *score mod* is any
function `score_mod(score, b, h, q_idx, kv_idx) -> score`. Both are FlexAttention's (Dong et al.,
"Flex Attention: A Programming Model for Generating Optimized Attention Kernels", 2024). Indices
are 0-dim integer tensors and always global, also when the sequence is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class MaskMod:
    """A mask mod that combines with `&`, `|` and `~`, also with plain functions.

    >>> own = MaskMod(lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 2 == 0)
    >>> mask = causal() & ~own
    """

    def __init__(self, fn: MaskFunction, name: str | None = None) -> None:
        if not callable(fn):
            raise TypeError(
                f"a mask is a function mask_mod(b, h, q_idx, kv_idx) -> bool tensor, "
                f"got {type(fn).__name__}"
            )
        self.fn = fn
        self.name = name or str(getattr(fn, "__name__", type(fn).__name__))

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.fn(b, h, q_idx, kv_idx)

    def __and__(self, other: MaskFunction) -> MaskMod:
        other = as_mask(other)
        return MaskMod(
            lambda b, h, q_idx, kv_idx: self(b, h, q_idx, kv_idx) & other(b, h, q_idx, kv_idx),
            f"({self.name} & {other.name})",
        )

    def __rand__(self, other: MaskFunction) -> MaskMod:
        return as_mask(other) & self

    def __or__(self, other: MaskFunction) -> MaskMod:
        other = as_mask(other)
        return MaskMod(
            lambda b, h, q_idx, kv_idx: self(b, h, q_idx, kv_idx) | other(b, h, q_idx, kv_idx),
            f"({self.name} | {other.name})",
        )

    def __ror__(self, other: MaskFunction) -> MaskMod:
        return as_mask(other) | self

    def __invert__(self) -> MaskMod:
        return MaskMod(
            lambda b, h, q_idx, kv_idx: ~self(b, h, q_idx, kv_idx),
            f"~{self.name}",
        )

    def __repr__(self) -> str:
        return self.name


def as_mask(fn: MaskFunction) -> MaskMod:
    """`fn` itself if it is a `MaskMod`, else `fn` wrapped in one."""
    return fn if isinstance(fn, MaskMod) else MaskMod(fn)


def full() -> MaskMod:
    """Every query sees every key."""
    return MaskMod(lambda b, h, q_idx, kv_idx: kv_idx >= 0, "full")


def causal() -> MaskMod:
    """A query sees itself and what comes before it: `kv_idx <= q_idx`."""
    return MaskMod(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx, "causal")


def sliding_window(left: int, right: int = 0) -> MaskMod:
    """A query sees itself, `left` tokens before it and `right` tokens after it.

    Args:
        left: tokens before the query, >= 0 (Mistral's window of `W` keys is `left = W - 1`).
        right: tokens after the query, >= 0.
    """
    _require_int("left", left, minimum=0)
    _require_int("right", right, minimum=0)

    def window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = q_idx - kv_idx
        return (distance <= left) & (distance >= -right)

    return MaskMod(window, f"sliding_window({left}, {right})")


def document(doc_ids: Tensor) -> MaskMod:
    """A query sees only tokens of its own document.

    Args:
        doc_ids: integers, `[S]` for all of the batch or `[B, S]`; equal ids are one document.
    """
    if not isinstance(doc_ids, Tensor):
        raise TypeError(f"doc_ids must be an integer tensor, got {type(doc_ids).__name__}")
    if doc_ids.is_floating_point() or doc_ids.is_complex() or doc_ids.dtype == torch.bool:
        raise TypeError(f"doc_ids must have an integer dtype, got {doc_ids.dtype}")
    if doc_ids.ndim not in (1, 2):
        raise ValueError(f"doc_ids must be [S] or [B, S], got shape {tuple(doc_ids.shape)}")

    def same_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if doc_ids.ndim == 1:
            return doc_ids[q_idx] == doc_ids[kv_idx]
        return doc_ids[b, q_idx] == doc_ids[b, kv_idx]

    return MaskMod(same_document, f"document({'x'.join(map(str, doc_ids.shape))})")


def document_from_lengths(lengths: Tensor | list[int]) -> MaskMod:
    """`document` for documents packed one after the other.

    Args:
        lengths: tokens of each document, `[number of documents]`, each >= 0; their sum is `S`.
    """
    lengths = torch.as_tensor(lengths)
    if lengths.ndim != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(
            f"lengths must be a 1-D list or tensor of integers, got shape {tuple(lengths.shape)} "
            f"of {lengths.dtype}"
        )
    if bool((lengths < 0).any()):
        raise ValueError(f"document lengths must be >= 0, got {int(lengths.min())}")
    ids = torch.arange(lengths.numel(), device=lengths.device)
    return document(torch.repeat_interleave(ids, lengths.long()))


def prefix_lm(prefix_length: int | Tensor) -> MaskMod:
    """Everybody sees the first `prefix_length` tokens; after them the mask is causal.

    Args:
        prefix_length: tokens, one number or a tensor `[B]`.
    """
    if isinstance(prefix_length, Tensor):
        floating = prefix_length.is_floating_point() or prefix_length.dtype == torch.bool
        if prefix_length.ndim != 1 or floating:
            raise ValueError(
                f"prefix_length must be an int or an integer tensor [B], got shape "
                f"{tuple(prefix_length.shape)} of {prefix_length.dtype}"
            )
        lengths = prefix_length
        return MaskMod(
            lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) | (kv_idx < lengths[b]),
            f"prefix_lm([{lengths.numel()}])",
        )
    _require_int("prefix_length", prefix_length, minimum=0)
    return MaskMod(
        lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) | (kv_idx < prefix_length),
        f"prefix_lm({prefix_length})",
    )


def dilated(dilation: int) -> MaskMod:
    """A query sees every `dilation`-th token, counted from itself (LongNet, Ding et al., 2023)."""
    _require_int("dilation", dilation, minimum=1)
    return MaskMod(
        lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % dilation == 0, f"dilated({dilation})"
    )


def chunked(chunk_size: int) -> MaskMod:
    """A query sees only its own chunk of `chunk_size` tokens (Llama 4's local layers)."""
    _require_int("chunk_size", chunk_size, minimum=1)
    return MaskMod(
        lambda b, h, q_idx, kv_idx: q_idx // chunk_size == kv_idx // chunk_size,
        f"chunked({chunk_size})",
    )


def alibi(slopes: Tensor) -> ScoreFunction:
    """Adds `slopes[h] * (kv_idx - q_idx)` to the score (Press et al., 2021, section 3).

    Args:
        slopes: `[Hq]`, floating point; may require a gradient.
    """
    if not isinstance(slopes, Tensor) or slopes.ndim != 1 or not slopes.is_floating_point():
        raise ValueError("slopes must be a floating-point tensor [Hq]")

    def alibi_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + slopes[h] * (kv_idx - q_idx)

    return alibi_score


def softcap(cap: float) -> ScoreFunction:
    """`cap * tanh(score / cap)`: bounds the scores (Gemma 2, 2024, section 2)."""
    if not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"cap must be a positive number, got {cap}")

    def softcap_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return softcap_score


def relative_position(bias: Tensor) -> ScoreFunction:
    """Adds a learned bias per distance, `bias[h, clamp(q_idx - kv_idx, -R, R) + R]`.

    Shaw et al., "Self-Attention with Relative Position Representations", 2018.

    Args:
        bias: `[Hq, 2 R + 1]`, floating point; may require a gradient.
    """
    if not isinstance(bias, Tensor) or bias.ndim != 2 or bias.shape[1] % 2 == 0:
        raise ValueError("bias must be a tensor [Hq, 2 * max_distance + 1]")
    reach = bias.shape[1] // 2

    def relative_score(
        score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
    ) -> Tensor:
        return score + bias[h, torch.clamp(q_idx - kv_idx, -reach, reach) + reach]

    return relative_score


def compose(*score_mods: ScoreFunction) -> ScoreFunction:
    """One score mod that applies `score_mods` from left to right."""
    for mod in score_mods:
        if not callable(mod):
            raise TypeError(f"compose takes score mods (functions), got {type(mod).__name__}")

    def composed(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        for mod in score_mods:
            score = mod(score, b, h, q_idx, kv_idx)
        return score

    return composed


def _require_int(name: str, value: int, *, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
