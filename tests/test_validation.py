"""Checks of what users pass to rf.flex_attention: the type of each error, and its text."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.attention.flex_attention import create_block_mask as torch_create_block_mask

import ringflex as rf


def tensor(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


def refused(error: type[Exception], **change: Any) -> str:
    """The text of the error that a good call raises with some arguments changed."""
    arguments: dict[str, Any] = {
        "query": tensor(2, 4, 50, 8),
        "key": tensor(2, 2, 50, 8),
        "value": tensor(2, 2, 50, 8),
        "enable_gqa": True,
    }
    rf.flex_attention(**arguments)
    with pytest.raises(error) as caught:
        rf.flex_attention(**(arguments | change))
    assert type(caught.value) is error
    return str(caught.value)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_tensors(name: str) -> None:
    assert refused(TypeError, **{name: [1.0]}) == f"{name} must be a tensor, got list"
    assert refused(ValueError, **{name: tensor(2, 50, 8)}) == (
        f"{name} must be [B, H, S, D], got shape (2, 50, 8)"
    )
    assert refused(TypeError, **{name: tensor(2, 2, 50, 8, dtype=torch.int32)}) == (
        f"{name} must be bf16, fp16, fp32 or fp64, got torch.int32"
    )
    assert refused(TypeError, **{name: tensor(2, 2, 50, 8, dtype=torch.complex64)}) == (
        f"{name} must be bf16, fp16, fp32 or fp64, got torch.complex64"
    )
    assert "query, key and value must have one dtype, got" in refused(
        TypeError, **{name: tensor(2, 2, 50, 8, dtype=torch.bfloat16)}
    )
    assert "query, key and value must be on one device, got" in refused(
        ValueError, **{name: tensor(2, 2, 50, 8, device="meta")}
    )
    assert "query, key and value must have one batch size, got query" in refused(
        ValueError, **{name: tensor(3, 2, 50, 8)}
    )
    assert refused(ValueError, **{name: tensor(2, 2, 0, 8)}) == (
        f"{name} has an empty dimension: shape (2, 2, 0, 8)"
    )


def test_tensor_subclasses() -> None:
    class Tagged(Tensor):
        pass

    tagged = tensor(2, 4, 50, 8).as_subclass(Tagged)
    text = refused(TypeError, query=tagged)
    assert text.startswith("query must be a plain torch.Tensor, got Tagged (of a DTensor, pass")
    parameter = torch.nn.Parameter(tensor(1, 1, 50, 8))
    assert rf.flex_attention(parameter, parameter, parameter).requires_grad


def test_heads_and_dims() -> None:
    assert "key and value must have the same heads and length" in refused(
        ValueError, value=tensor(2, 4, 50, 8)
    )
    assert "key and value must have the same heads and length" in refused(
        ValueError, value=tensor(2, 2, 49, 8)
    )
    assert "query and key must have the same head dim" in refused(
        ValueError, query=tensor(2, 4, 50, 16)
    )
    assert "query heads must be a multiple of key heads" in refused(
        ValueError, query=tensor(2, 3, 50, 8)
    )
    assert "query heads must be a multiple of key heads" in refused(
        ValueError, query=tensor(2, 1, 50, 8)
    )
    assert refused(ValueError, enable_gqa=False) == (
        "query has 4 heads, key 2: pass enable_gqa=True for grouped-query attention"
    )


def test_block_mask_of_another_length() -> None:
    mask = rf.create_block_mask(rf.causal(), None, None, 64, 50)
    expected = (
        "block_mask was made for Q_LEN=64, KV_LEN=50; query and key have 50 and 50 tokens: "
        "make one for these lengths"
    )
    assert refused(ValueError, block_mask=mask) == expected
    theirs = torch_create_block_mask(rf.causal(), None, None, 64, 50, device="cpu")
    assert refused(ValueError, block_mask=theirs) == expected
    # A block mask for whole blocks is not one for the true length.
    padded = rf.create_block_mask(rf.causal(), None, None, 128, 128)
    assert "made for Q_LEN=128, KV_LEN=128" in refused(ValueError, block_mask=padded)


def test_block_mask_of_another_batch_or_head_count() -> None:
    documents = rf.document(torch.zeros(3, 50, dtype=torch.int64))
    text = refused(ValueError, block_mask=rf.create_block_mask(documents, 3, None, 50, 50))
    assert text == (
        "mask 'document(3x50)' depends on b and was made for B=3; query has shape "
        "(2, 4, 50, 8): make it with B=2"
    )
    by_head = lambda b, h, q_idx, kv_idx: q_idx - kv_idx < h
    text = refused(ValueError, block_mask=rf.create_block_mask(by_head, None, 2, 50, 50))
    assert "mask '<lambda>' depends on h and was made for H=2" in text  # query heads, not key heads
    one = torch_create_block_mask(documents, 1, None, 50, 50, device="cpu")
    assert "depends on b and was made for B=1" in refused(ValueError, block_mask=one)


def test_what_is_no_block_mask() -> None:
    text = refused(TypeError, block_mask=rf.causal())
    assert text == (
        "block_mask must be a BlockMask (rf.create_block_mask or torch's), a Plan (rf.plan) or "
        "None, got MaskMod: pass a mask_mod through rf.create_block_mask"
    )
    assert refused(TypeError, block_mask=tensor(50, 50)).endswith("or None, got Tensor")
    plans = {"local": rf.plan(rf.causal(), 50)}
    assert refused(TypeError, block_mask=plans).endswith("or None, got dict")


def test_plans() -> None:
    plan = rf.plan(rf.causal(), 60, block_size=16)
    assert refused(ValueError, block_mask=plan) == (
        "the plan holds 64 slots of 60 tokens on each of 1 ranks; query and key have 50 and 50 "
        "tokens: pass this rank's shard, e.g. plan.shard(x, dim=2)"
    )
    simulated = rf.plan_all(rf.causal(), 100, 2, block_size=50)[0]
    assert refused(ValueError, block_mask=simulated) == (
        "this plan of 2 ranks was made without a process group (plan_all); "
        "make it with rf.plan(..., group=...) on every rank"
    )


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), "1", torch.tensor(0.5), (1,)])
def test_scale(scale: object) -> None:
    text = refused(ValueError, scale=scale)
    assert text == f"scale must be a finite number or None, got {scale!r}"


def test_options() -> None:
    assert refused(ValueError, kernel_options={"b": 1, "a": 2}) == (
        "kernel_options has ['a', 'b']; options are deterministic, backward, approximate_tanh, "
        "tune, tiles, tma, gradient_dtype"
    )
    assert refused(TypeError, kernel_options={"deterministic": 1}) == (
        "kernel_options['deterministic'] must be a bool, got 1"
    )
    assert refused(ValueError, kernel_options={"backward": "fast"}) == (
        "kernel_options['backward'] must be auto, one_pass or two_pass, got 'fast'"
    )
    assert refused(ValueError, kernel_options={"backward": "one_pass", "deterministic": True}) == (
        "the one_pass backward is not deterministic; ask for two_pass"
    )
    assert refused(ValueError, kernel_options={"tiles": {"merge": (64, 64, 4, 2)}}) == (
        "kernel_options['tiles'] has 'merge'; kernels are forward, key, query"
    )
    assert refused(ValueError, kernel_options={"tiles": {"key": (64, 8, 4, 2)}}) == (
        "kernel_options['tiles']['key'] must be (block_m, block_n, num_warps, num_stages): powers "
        "of two (stages: any), blocks of 16 or more; got (64, 8, 4, 2)"
    )
    rf.flex_attention(*[tensor(1, 1, 5, 8)] * 3, kernel_options={})
    assert refused(NotImplementedError, return_aux=AuxRequest(max_scores=True)) == (
        "return_aux with max_scores is not supported; lse is"
    )
    both = {"return_lse": True, "return_aux": AuxRequest(lse=True)}
    assert refused(ValueError, **both) == "pass return_lse or return_aux, not both"
    text = refused(ValueError, backend="fastest")
    assert text.startswith("backend='fastest' is not one of auto, eager")


def test_sinks() -> None:
    assert refused(ValueError, sinks=tensor(2)) == "sinks must be [Hq] = [4], got shape (2,)"
    assert refused(ValueError, sinks=tensor(1, 4)) == "sinks must be [Hq] = [4], got shape (1, 4)"
    for sinks in (0.5, tensor(4, dtype=torch.int64)):
        text = refused(TypeError, sinks=sinks)
        assert text == "sinks must be a floating-point tensor [Hq]"
    assert refused(ValueError, sinks=tensor(4, device="meta")) == (
        "sinks are on meta, query is on cpu"
    )


def test_score_mods() -> None:
    assert refused(TypeError, score_mod=tensor(4)).startswith(
        "score_mod must be a function score_mod(score, b, h, q_idx, kv_idx), got Tensor"
    )
    assert "score_mod 'causal' must be callable as score_mod(score, b, h, q_idx, kv_idx)" in (
        refused(TypeError, score_mod=rf.causal())
    )
    table = tensor(4, device="meta")
    assert refused(ValueError, score_mod=lambda s, b, h, q_idx, kv_idx: s + table[h]) == (
        "score_mod '<lambda>' captures a tensor of shape (4,) on meta, query is on cpu: "
        "move it there"
    )


def test_captured_table_that_is_too_short() -> None:
    bias = tensor(4, 30)
    text = refused(
        ValueError,
        score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[h, kv_idx],
    )
    assert "(4, 30)" in text
