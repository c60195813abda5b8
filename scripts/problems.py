"""What benchmarks measure: masks, scores, and how many pairs of query and key a head sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WINDOW = 4096
SHORT = 16384  # tokens, below which windows and documents may shrink in proportion
# Share of documents per range of lengths, and the ranges' upper ends: MagiAttention's benchmark.
_SHARES = (18.6, 28.2, 24.6, 15.7, 7.3, 3.1, 1.3, 0.9, 0.4)
_ENDS = (200, 500, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The mods, the same Python functions for all contenders, and the visible pairs of a head.

    Attributes:
        mask_mod, score_mod: or None.
    """

    mask_mod: Any
    score_mod: Any
    pairs: int


def problem(
    name: str, tokens: int, device: torch.device, heads: int = 1, *, shrink: bool = False
) -> Problem:
    """One by name.

    Args:
        name: full (no mask), window, documents (log-normal lengths, mean about 3k), mixed
            (documents, a few very long), prefix, causal, alibi or softcap; all but full and prefix
            are causal, too.
        heads: for alibi. shrink: where there are few tokens, windows and documents are shorter.
    """
    S = tokens
    triangle = S * (S + 1) // 2
    mask_mod: Any = lambda b, h, q_idx, kv_idx: q_idx >= kv_idx
    score_mod: Any = None
    pairs = triangle
    if name == "full":
        mask_mod, pairs = None, S * S
    elif name == "window":
        width = min(WINDOW, max(1, S * WINDOW // SHORT)) if shrink else WINDOW
        mask_mod = lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < width)
        inside = min(S, width)
        pairs = inside * (inside + 1) // 2 + (S - inside) * width
    elif name in ("documents", "mixed"):
        lengths = document_lengths(name, S, shrink=shrink)
        lengths = lengths[: int(torch.searchsorted(lengths.cumsum(0), S)) + 1]
        ids = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)[:S]
        counts = torch.bincount(ids)
        pairs = int((counts * (counts + 1) // 2).sum())
        ids = ids.to(device)
        mask_mod = lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (ids[q_idx] == ids[kv_idx])
    elif name == "prefix":
        prefix = S // 4
        mask_mod = lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) | (kv_idx < prefix)
        pairs = triangle + prefix * (prefix - 1) // 2
    elif name == "alibi":
        slopes = torch.exp2(-8.0 * torch.arange(1, heads + 1, device=device) / heads)
        score_mod = lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx)
    elif name == "softcap":
        score_mod = lambda s, b, h, q_idx, kv_idx: 20.0 * torch.tanh(s / 20.0)
    elif name != "causal":
        raise ValueError(f"no problem is called {name!r}")
    return Problem(mask_mod=mask_mod, score_mod=score_mod, pairs=pairs)


def document_lengths(name: str, tokens: int, *, shrink: bool = False) -> Tensor:
    """As many lengths as tokens, the same on every rank: `documents` log-normal; `mixed` by the
    table above, capped at a quarter of the total."""
    generator = torch.Generator().manual_seed(0)
    part = min(1.0, tokens / SHORT) if shrink else 1.0
    if name == "documents":
        drawn = torch.empty(tokens).log_normal_(7.5, 1.0, generator=generator)
        return (drawn * part).long() + 1
    shares, ends = torch.tensor(_SHARES), torch.tensor((0, *_ENDS))
    which = torch.multinomial(shares, tokens, replacement=True, generator=generator)
    span = ends[which + 1] - ends[which]
    drawn = ends[which] + 1 + torch.rand(tokens, generator=generator) * span
    return (drawn * part).long().clamp(1, max(1, tokens // 4))
