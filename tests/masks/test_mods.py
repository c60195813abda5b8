"""Mask and score factories against formulas written out in Python, one element at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ringflex.masks.mods import (
    MaskMod,
    alibi,
    as_mask,
    causal,
    chunked,
    compose,
    dilated,
    document,
    document_from_lengths,
    full,
    prefix_lm,
    relative_position,
    sliding_window,
    softcap,
)

B, H, S = 2, 2, 13
SITES = [(b, h, q, k) for b in range(B) for h in range(H) for q in range(S) for k in range(S)]

ids = [0, 0, 0, 1, 2, 2, 0, 0, 5, 5, 5, 1, 7]  # document 0 is in two pieces, 1 too
batch_ids = [ids, [-3] * 6 + [4] * 7]
packed = [0] * 4 + [2] * 1 + [3] * 8
starts = [3, 0]
chunk_of_5 = "aaaaabbbbbccc"


def outside_first(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (kv_idx >= 2) | (b == 1)


MASKS: list[tuple[Callable[..., Tensor], str, Callable[[int, int, int, int], bool]]] = [
    (full(), "full", lambda b, h, q, k: True),
    (causal(), "causal", lambda b, h, q, k: k <= q),
    (sliding_window(3), "sliding_window(3, 0)", lambda b, h, q, k: k in range(q - 3, q + 1)),
    (sliding_window(0), "sliding_window(0, 0)", lambda b, h, q, k: k == q),
    (sliding_window(2, 4), "sliding_window(2, 4)", lambda b, h, q, k: k in range(q - 2, q + 5)),
    (sliding_window(0, 1), "sliding_window(0, 1)", lambda b, h, q, k: k in (q, q + 1)),
    (document(torch.tensor(ids)), "document(13)", lambda b, h, q, k: ids[q] == ids[k]),
    (
        document(torch.tensor(batch_ids, dtype=torch.int32)),
        "document(2x13)",
        lambda b, h, q, k: batch_ids[b][q] == batch_ids[b][k],
    ),
    (
        document_from_lengths([4, 0, 1, 8]),
        "document(13)",
        lambda b, h, q, k: packed[q] == packed[k],
    ),
    (prefix_lm(4), "prefix_lm(4)", lambda b, h, q, k: k <= q or k < 4),
    (prefix_lm(0), "prefix_lm(0)", lambda b, h, q, k: k <= q),
    (
        prefix_lm(torch.tensor(starts)),
        "prefix_lm([2])",
        lambda b, h, q, k: k <= q or k < starts[b],
    ),
    (dilated(3), "dilated(3)", lambda b, h, q, k: abs(q - k) in (0, 3, 6, 9, 12)),
    (dilated(1), "dilated(1)", lambda b, h, q, k: True),
    (chunked(5), "chunked(5)", lambda b, h, q, k: chunk_of_5[q] == chunk_of_5[k]),
    (
        causal() & chunked(5),
        "(causal & chunked(5))",
        lambda b, h, q, k: k <= q and chunk_of_5[q] == chunk_of_5[k],
    ),
    (
        causal() | chunked(5),
        "(causal | chunked(5))",
        lambda b, h, q, k: k <= q or chunk_of_5[q] == chunk_of_5[k],
    ),
    (~causal(), "~causal", lambda b, h, q, k: k > q),
    (~~causal(), "~~causal", lambda b, h, q, k: k <= q),
    (
        causal() & outside_first,
        "(causal & outside_first)",
        lambda b, h, q, k: k <= q and (k >= 2 or b == 1),
    ),
    (
        outside_first & causal(),
        "(outside_first & causal)",
        lambda b, h, q, k: k <= q and (k >= 2 or b == 1),
    ),
    (
        causal() | outside_first,
        "(causal | outside_first)",
        lambda b, h, q, k: k <= q or k >= 2 or b == 1,
    ),
    (
        outside_first | causal(),
        "(outside_first | causal)",
        lambda b, h, q, k: k <= q or k >= 2 or b == 1,
    ),
    (
        causal() & ~sliding_window(3) | dilated(4) & ~as_mask(outside_first),
        "((causal & ~sliding_window(3, 0)) | (dilated(4) & ~outside_first))",
        lambda b, h, q, k: (k <= q and q - k > 3) or ((q - k) % 4 == 0 and k < 2 and b == 0),
    ),
]


@pytest.mark.parametrize(("mask", "name", "formula"), MASKS, ids=[case[1][:60] for case in MASKS])
def test_masks(mask: MaskMod, name: str, formula: Callable[..., bool]) -> None:
    assert repr(mask) == name
    for site in SITES:
        seen = mask(*map(torch.tensor, site))
        assert seen.dtype == torch.bool and seen.shape == ()
        assert seen.item() == formula(*site), site


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_document_lengths_of_any_integer_dtype(dtype: torch.dtype) -> None:
    mask = document_from_lengths(torch.tensor([4, 0, 1, 8], dtype=dtype))
    for b, h, q, k in SITES:
        assert mask(*map(torch.tensor, (b, h, q, k))).item() == (packed[q] == packed[k])


def test_combining_leaves_the_operands_alone() -> None:
    mask = causal()
    combined = mask & outside_first
    assert repr(mask) == "causal" and combined is not mask
    assert as_mask(mask) is mask


def test_a_mask_takes_the_name_given_or_the_function_s() -> None:
    assert repr(MaskMod(outside_first)) == "outside_first"
    assert repr(MaskMod(outside_first, "mine")) == "mine"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sliding_window(-1), ValueError, "left must be >= 0, got -1"),
        (lambda: sliding_window(1, -2), ValueError, "right must be >= 0, got -2"),
        (lambda: sliding_window(1.5), TypeError, "left must be an int, got float"),  # type: ignore[arg-type]
        (lambda: sliding_window(True), TypeError, "left must be an int, got bool"),
        (lambda: dilated(0), ValueError, "dilation must be >= 1, got 0"),
        (lambda: chunked(0), ValueError, "chunk_size must be >= 1, got 0"),
        (lambda: chunked("8"), TypeError, "chunk_size must be an int, got str"),  # type: ignore[arg-type]
        (lambda: prefix_lm(-1), ValueError, "prefix_length must be >= 0, got -1"),
        (lambda: prefix_lm(2.0), TypeError, "prefix_length must be an int, got float"),  # type: ignore[arg-type]
        (
            lambda: prefix_lm(torch.tensor([[1]])),
            ValueError,
            r"an integer tensor \[B\], got shape \(1, 1\) of torch.int64",
        ),
        (
            lambda: prefix_lm(torch.tensor([1.0])),
            ValueError,
            r"an integer tensor \[B\], got shape \(1,\) of torch.float32",
        ),
        (
            lambda: prefix_lm(torch.tensor([True])),
            ValueError,
            r"an integer tensor \[B\], got shape \(1,\) of torch.bool",
        ),
        (lambda: document([0, 0, 1]), TypeError, "doc_ids must be an integer tensor, got list"),  # type: ignore[arg-type]
        (
            lambda: document(torch.tensor([0.0, 1.0])),
            TypeError,
            "doc_ids must have an integer dtype, got torch.float32",
        ),
        (
            lambda: document(torch.tensor([True])),
            TypeError,
            "doc_ids must have an integer dtype, got torch.bool",
        ),
        (
            lambda: document(torch.zeros(1, 2, 3, dtype=torch.int64)),
            ValueError,
            r"doc_ids must be \[S\] or \[B, S\], got shape \(1, 2, 3\)",
        ),
        (
            lambda: document_from_lengths([3, -1]),
            ValueError,
            "document lengths must be >= 0, got -1",
        ),
        (
            lambda: document_from_lengths(torch.tensor([[1, 2]])),
            TypeError,
            r"1-D list or tensor of integers, got shape \(1, 2\) of torch.int64",
        ),
        (
            lambda: document_from_lengths([1.5]),  # type: ignore[list-item]
            TypeError,
            r"1-D list or tensor of integers, got shape \(1,\) of torch.float32",
        ),
        (
            lambda: MaskMod(3),  # type: ignore[arg-type]
            TypeError,
            r"a mask is a function mask_mod\(b, h, q_idx, kv_idx\) -> bool tensor, got int",
        ),
        (lambda: causal() & None, TypeError, "a mask is a function .* got NoneType"),
        (lambda: torch.tensor(True) | causal(), TypeError, "a mask is a function .* got Tensor"),
        (lambda: alibi([1.0]), ValueError, r"slopes must be a floating-point tensor \[Hq\]"),  # type: ignore[arg-type]
        (
            lambda: alibi(torch.ones(2, 2)),
            ValueError,
            r"slopes must be a floating-point tensor \[Hq\]",
        ),
        (
            lambda: alibi(torch.arange(2)),
            ValueError,
            r"slopes must be a floating-point tensor \[Hq\]",
        ),
        (lambda: softcap(0.0), ValueError, "cap must be a positive number, got 0.0"),
        (lambda: softcap(-3), ValueError, "cap must be a positive number, got -3"),
        (lambda: softcap(math.inf), ValueError, "cap must be a positive number, got inf"),
        (lambda: softcap(math.nan), ValueError, "cap must be a positive number, got nan"),
        (
            lambda: relative_position(torch.ones(2, 4)),
            ValueError,
            r"bias must be a tensor \[Hq, 2 \* max_distance \+ 1\]",
        ),
        (
            lambda: relative_position(torch.ones(5)),
            ValueError,
            r"bias must be a tensor \[Hq, 2 \* max_distance \+ 1\]",
        ),
        (lambda: compose(softcap(3.0), 5), TypeError, r"compose takes score mods .* got int"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


slopes = torch.tensor([0.25, -2.0], dtype=torch.float64)
bias = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

SCORES: list[tuple[str, Callable[..., Tensor], Callable[..., float]]] = [
    ("alibi", alibi(slopes), lambda s, b, h, q, k: s + [0.25, -2.0][h] * (k - q)),
    ("softcap", softcap(1.5), lambda s, b, h, q, k: 1.5 * math.tanh(s / 1.5)),
    (
        "relative",
        relative_position(bias),
        lambda s, b, h, q, k: s + bias[h].tolist()[min(max(q - k, -3), 3) + 3],
    ),
    (
        "compose",
        compose(alibi(slopes), softcap(2.0)),
        lambda s, b, h, q, k: 2 * math.tanh((s + [0.25, -2.0][h] * (k - q)) / 2),
    ),
    (
        "compose_other_way",
        compose(softcap(2.0), alibi(slopes)),
        lambda s, b, h, q, k: 2 * math.tanh(s / 2) + [0.25, -2.0][h] * (k - q),
    ),
    ("compose_nothing", compose(), lambda s, b, h, q, k: s),
]


@pytest.mark.parametrize(("name", "mod", "formula"), SCORES, ids=[case[0] for case in SCORES])
def test_scores(name: str, mod: Callable[..., Tensor], formula: Callable[..., float]) -> None:
    for i, site in enumerate(SITES):
        score = (i * 37 % 101 - 50) / 10
        found = mod(torch.tensor(score, dtype=torch.float64), *map(torch.tensor, site))
        assert found.item() == pytest.approx(formula(score, *site), rel=1e-12, abs=1e-12), site


def test_score_factories_read_the_tensor_given() -> None:
    """A later change of the parameter (an optimiser's step) is seen, and a gradient reaches it."""
    slopes = torch.ones(2, requires_grad=True)
    mod = alibi(slopes)
    with torch.no_grad():
        slopes[1] = 5.0
    out = mod(torch.tensor(1.0), *map(torch.tensor, (0, 1, 7, 3)))
    assert out.item() == 1 + 5.0 * (3 - 7)
    out.backward()
    assert slopes.grad is not None and slopes.grad.tolist() == [0, -4]
