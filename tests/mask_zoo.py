"""Masks of every kind, for tests of whatever takes a mask: builders, kernels, plans, schedules.

>>> for case in MASKS:
...     B, H = 2 if case.needs_b else None, 4 if case.needs_h else None
...     block_mask = create_block_mask(case.make(length, 2, 4), B, H, length, length)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ringflex.masks.mods import (
    causal,
    chunked,
    dilated,
    document,
    document_from_lengths,
    full,
    prefix_lm,
    sliding_window,
)

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class MaskCase(NamedTuple):
    """`make(S, B, H)` gives a mask for positions below `S`, the same one at every call.

    Attributes:
        needs_b, needs_h: whether the mask depends on the batch element, on the query head.
    """

    name: str
    make: Callable[[int, int, int], MaskFunction]
    needs_b: bool = False
    needs_h: bool = False


def _first(n: int) -> MaskFunction:
    return lambda b, h, q_idx, kv_idx: kv_idx < n


def _draw(low: int, high: int, *shape: int) -> Tensor:
    """int64 in `low .. high - 1`, from a seed of its own."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(17))


def _documents(*shape: int) -> Tensor:
    """Ids of documents of about ten tokens, many of them of one token."""
    return (_draw(0, 10, *shape) < 2).cumsum(-1)


def _random_blocks(S: int, B: int, H: int) -> MaskFunction:
    table = _draw(0, 3, B, H, S // 24 + 1, S // 24 + 1) == 0
    return lambda b, h, q_idx, kv_idx: table[b, h, q_idx // 24, kv_idx // 24]


def _elements(S: int, B: int, H: int) -> MaskFunction:
    table = _draw(0, 50, S, S) == 0
    return lambda b, h, q_idx, kv_idx: table[q_idx, kv_idx]


def _shared_label(S: int, B: int, H: int) -> MaskFunction:
    labels = _draw(0, 8, S, 4) == 0  # a token has some of four labels
    return lambda b, h, q_idx, kv_idx: (labels[q_idx] & labels[kv_idx]).any() & (kv_idx <= q_idx)


def _window_per_head(S: int, B: int, H: int) -> MaskFunction:
    reach = 3 + 40 * torch.arange(H)
    return lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() <= reach[h]


def _float_window(S: int, B: int, H: int) -> MaskFunction:
    return lambda b, h, q_idx, kv_idx: torch.exp((kv_idx - q_idx) * 0.1).clamp(max=2.0) > 0.05


def _middle_rows(S: int, B: int, H: int) -> MaskFunction:
    return lambda b, h, q_idx, kv_idx: (q_idx >= S // 3) & (q_idx < S // 2)


MASKS: tuple[MaskCase, ...] = (
    MaskCase("full", lambda S, B, H: full()),
    MaskCase("nothing", lambda S, B, H: ~full()),
    MaskCase("causal", lambda S, B, H: causal()),
    MaskCase("future", lambda S, B, H: ~causal()),  # the last row sees nothing
    MaskCase("window", lambda S, B, H: sliding_window(37, 5)),
    MaskCase("diagonal", lambda S, B, H: sliding_window(0)),
    MaskCase("causal_sinks", lambda S, B, H: causal() & (sliding_window(50) | _first(4))),
    MaskCase("documents", lambda S, B, H: document(_documents(S))),
    MaskCase("batch_documents", lambda S, B, H: causal() & document(_documents(B, S)), True),
    MaskCase("unsorted_documents", lambda S, B, H: document(_draw(0, 5, S).int())),
    MaskCase("packed", lambda S, B, H: document_from_lengths([1, S // 2, 0, S - S // 2])),
    MaskCase("prefix", lambda S, B, H: prefix_lm(S // 3)),
    MaskCase("batch_prefix", lambda S, B, H: prefix_lm(_draw(0, S + 1, B)), True),
    MaskCase("dilated", lambda S, B, H: dilated(3) & causal()),
    MaskCase("chunked", lambda S, B, H: chunked(48)),
    MaskCase("chunked_or_prefix", lambda S, B, H: chunked(100) & causal() | _first(20)),
    MaskCase("middle_rows", _middle_rows),
    MaskCase("window_per_head", _window_per_head, False, True),
    MaskCase("random_blocks", _random_blocks, True, True),
    MaskCase("random_elements", _elements),
    MaskCase("float_window", _float_window),
    MaskCase("shared_label", _shared_label),  # not scalar inside: evaluated by vmap
)
