"""What is refused as a mod, with the way to write it: branches, values taken out, other results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from ringflex.masks.trace import trace_mask, trace_score

Mod = Callable[..., Tensor]
row = torch.tensor([3, -1, 4, 1, -5, 9, 2])  # int64 [7]
vectors = torch.zeros(7, 4)


def test_values_of_captured_tensors_are_not_taken() -> None:
    """They would become numbers of the graph, and later changes be ignored."""
    flag, number = torch.tensor(True), torch.tensor(3)
    mods: list[Mod] = [
        lambda b, h, q, k: q - k < number.item(),
        lambda b, h, q, k: q - k < int(number),
        lambda b, h, q, k: q > k if flag else q < k,
        lambda b, h, q, k: q - k < torch.full((), number),  # type: ignore[call-overload]
        lambda b, h, q, k: (q - k < 3) & (3 in number),
    ]
    for mod in mods:
        with pytest.raises(ValueError, match="turns a tensor into a Python value"):
            trace_mask(mod)
    assert trace_mask(lambda b, h, q, k: (q - k < number) & flag).captures == (number, flag)


def test_an_index_of_bytes_is_refused() -> None:
    table, places = torch.arange(20), torch.arange(20, dtype=torch.uint8)
    with pytest.raises(
        TypeError, match=r"uint8 means a mask to torch; write `table\[i.long\(\)\]`"
    ):
        trace_mask(lambda b, h, q, k: table[places[q]] > k)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.rand(()),
        lambda x: torch.rand_like(x),
        lambda x: torch.randint(2, ()).float(),
        lambda x: torch.nn.functional.dropout(x, 0.1),
        lambda x: torch.bernoulli(x),
    ],
)
def test_random_numbers_are_refused(draw: Mod) -> None:
    """A mod is evaluated several times: they would differ between forward and backward."""
    for trace, mod in (
        (trace_mask, lambda b, h, q, k: draw(q * 0.1) < 0.5),
        (lambda f: trace_score(f, torch.float32), lambda s, b, h, q, k: s * draw(q * 0.1)),
    ):
        with pytest.raises(ValueError, match=r"draws random numbers by aten\..*refusals\.py:"):
            trace(mod)


def branching(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    if q_idx > kv_idx:  # this very line is named
        return q_idx > 3
    return q_idx > 2


BRANCHES: dict[str, Mod] = {
    "if": branching,
    "and": lambda b, h, q, k: (q > k) and (q < 3),
    "or": lambda b, h, q, k: (q > k) or (q < 3),
    "not": lambda b, h, q, k: not (q > k),  # type: ignore[return-value]
    "chained": lambda b, h, q, k: 0 <= q < 3,
    "conditional": lambda b, h, q, k: (q > 1) if h else (k > 1),
    "max": lambda b, h, q, k: max(q, k) > 2,
    "in": lambda b, h, q, k: torch.tensor(q in [3, 4]),
    "item": lambda b, h, q, k: torch.tensor(q.item() > 3),
    "int": lambda b, h, q, k: torch.tensor(int(q) > 3),
    "float": lambda b, h, q, k: torch.tensor(float(q) > 3),
    "range": lambda b, h, q, k: torch.tensor(len(range(q)) > 3),  # type: ignore[call-overload]
    "list_index": lambda b, h, q, k: torch.tensor([True, False, True, False, True][q]),  # type: ignore[call-overload]
    "format": lambda b, h, q, k: torch.tensor(f"{q}" == "3"),
    "tolist": lambda b, h, q, k: torch.tensor(q.tolist() > 3),
    "numpy": lambda b, h, q, k: torch.as_tensor(q.numpy() > 3),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branching_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="turns a tensor into a Python value") as caught:
        trace_mask(BRANCHES[name])
    for advice in ("`a & b` for `a and b`", "`(low <= x) & (x < high)`", "`torch.where(condition,"):
        assert advice in str(caught.value)


def test_branching_names_the_line() -> None:
    with pytest.raises(
        ValueError, match=r"mask_mod 'branching' turns .* Python value \("
    ) as caught:
        trace_mask(branching)
    line = branching.__code__.co_firstlineno + 1
    assert f"test_trace_refusals.py:{line}: if q_idx > kv_idx:" in str(caught.value)


def test_branching_in_a_score_is_refused() -> None:
    with pytest.raises(ValueError, match="score_mod '<lambda>' turns a tensor into a Python value"):
        trace_score(lambda s, b, h, q, k: s if q > k else -s, torch.float32)


def test_an_error_inside_the_mod_is_passed_on() -> None:
    def broken(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match=r"^my own$"):
        trace_mask(broken)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda b, h, q, k: True, r"must return a boolean tensor, e\.g\. .*; got bool True"),
        (lambda b, h, q, k: None, "must return a boolean tensor, .*; got NoneType None"),
        (lambda b, h, q, k: (q > k, q), "must return a boolean tensor, .*; got tuple"),
        (lambda b, h, q, k: q - k, r"must return a boolean tensor, .*; got dtype torch\.int64"),
        (lambda b, h, q, k: (q > k) * 1.0, "must return a boolean tensor.* dtype torch.float32"),
        (
            lambda b, h, q, k: (q > k)[None],
            r"called for one element and must return one value; got shape \(1,\)",
        ),
        (lambda b, h, q, k: q > row, r"must return one value; got shape \(7,\)"),
        (
            lambda b, h, q: q > 3,
            r"'<lambda>' must be callable as mask_mod\(b, h, q_idx, kv_idx\); its signature is "
            r"<lambda>\(b, h, q\): too many positional arguments",
        ),
        (lambda s, b, h, q, k: q > 3, r"callable as mask_mod\(.*missing a required argument: 'k'"),
        (lambda *, b, h, q, k: q > 3, "must be callable as mask_mod"),
        (5, r"mask_mod must be a function mask_mod\(b, h, q_idx, kv_idx\), got int: 5"),
        (None, "mask_mod must be a function .*, got NoneType: None"),
        (row, "mask_mod must be a function .*, got Tensor: tensor"),
    ],
)
def test_what_is_no_mask_is_refused(fn: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        trace_mask(fn)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (
            lambda s, b, h, q, k: q,
            r"must return the score as a floating-point tensor, e\.g\. .*; got dtype torch\.int64",
        ),
        (lambda s, b, h, q, k: s > 0, r"must return the score .*; got dtype torch\.bool"),
        (lambda s, b, h, q, k: 1.5, r"must return the score .*; got float 1\.5"),
        (lambda s, b, h, q, k: s + vectors[q], r"must return one value; got shape \(4,\)"),
        (
            lambda s, b, h, q: s,
            r"'<lambda>' must be callable as score_mod\(score, b, h, q_idx, kv_idx\); its sign",
        ),
        ("causal", r"score_mod must be a function score_mod\(score, b, h, .*, got str: 'causal'"),
    ],
)
def test_what_is_no_score_mod_is_refused(fn: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        trace_score(fn, torch.float32)


class Tagged(Tensor):
    """A subclass with no behaviour of its own."""


@pytest.mark.parametrize("captured", [TwoTensor(row, row), row.as_subclass(Tagged)], ids=type)
def test_captured_subclasses_are_refused(captured: Tensor) -> None:
    message = f"a captured tensor must be a plain torch.Tensor, got {type(captured).__name__}"
    with pytest.raises(TypeError, match=message):
        trace_mask(lambda b, h, q, k: captured[q] == captured[k])


def test_a_captured_dtensor_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        captured = distribute_tensor(row, init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"got DTensor \(of a DTensor, capture `\.full_tensor"):
            trace_mask(lambda b, h, q, k: captured[q] == captured[k])
        with pytest.raises(TypeError, match=r"got DTensor \(of a DTensor, capture `\.full_tensor"):
            trace_score(lambda s, b, h, q, k: s * captured[k], torch.float32)
    finally:
        dist.destroy_process_group()
