"""Gradients: which are computed, which are refused, and that two runs give the same bits."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist

import ringflex as rf
from attention_cases import LAYOUTS, STRATEGIES, Case, assert_same_bits, attend, tensors
from rank_pool import RankPool
from ringflex.reference import Reference

LEARNED = Case(
    mask="tree", score="composed", seq_len=300, dtype=torch.float32, sinks=True, dlse=True
)


def twice_on_rank(
    group: dist.ProcessGroup, case: Case, threads: int
) -> list[dict[str, torch.Tensor]]:
    torch.set_num_threads(threads)
    try:
        problem, found = case.build(), []
        for layout, strategy in zip(LAYOUTS, STRATEGIES):
            results = []
            for _ in range(2):
                plan = rf.plan(
                    problem.mask, case.seq_len, group,
                    layout=layout, strategy=strategy, block_size=case.block_size,
                    machine=rf.Machine(at_once=0),
                )  # fmt: skip
                results.append(attend(problem.shard(plan), plan))
            assert_same_bits(*results)
            found.append(tensors(results[0]))
        return found
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 4])
def test_ranks_repeat_their_bits(pool: RankPool, threads: int) -> None:
    first, second = (pool.run(twice_on_rank, 3, LEARNED, threads) for _ in range(2))
    for rank in range(3):
        for one, two in zip(first[rank], second[rank], strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("score", ["relative", "alibi", "by position", "low rank", "composed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_threads_repeat_their_bits(score: str, dtype: torch.dtype) -> None:
    case = replace(LEARNED, score=score, mask="causal", seq_len=777, block_size=64, dtype=dtype)
    problem = case.build()
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        mask = rf.create_block_mask(problem.mask, case.B, case.Hq, 777, 777, BLOCK_SIZE=64)
        first: Reference = attend(problem, mask)
        for _ in range(4):
            assert_same_bits(first, attend(problem, mask))
    finally:
        torch.set_num_threads(before)


def subsets_on_rank(group: dist.ProcessGroup) -> None:
    """Any subset of the inputs may want gradients, and gets those of the whole set."""
    case = replace(LEARNED, seq_len=129, dtype=torch.float64)
    problem = case.build()
    plan = rf.plan(problem.mask, case.seq_len, group, block_size=16)
    local = problem.shard(plan)
    whole = tensors(attend(local, plan))
    assert local.sinks is not None
    inputs = {"dq": local.q, "dk": local.k, "dv": local.v, "dsinks": local.sinks}
    inputs |= {f"dcapture{i}": x for i, x in enumerate(local.captures)}
    for wanted in ({"dq"}, {"dk"}, {"dv"}, {"dq", "dsinks"}, {"dcapture1"}, {"dsinks"}):
        for name, x in inputs.items():
            x.requires_grad_(name in wanted)
        out, lse = rf.flex_attention(
            local.q, local.k, local.v, local.score, plan,
            enable_gqa=True, return_lse=True, sinks=local.sinks,
        )  # fmt: skip
        found = torch.autograd.grad(
            [out, lse], [inputs[name] for name in sorted(wanted)], [local.dout, local.dlse]
        )
        for name, gradient in zip(sorted(wanted), found):
            assert torch.equal(gradient, whole[name]), (wanted, name)


@pytest.mark.parametrize("world_size", [1, 3])
def test_gradients_of_some_inputs(pool: RankPool, world_size: int) -> None:
    pool.run(subsets_on_rank, world_size)


def one_tensor_on_rank(group: dist.ProcessGroup) -> None:
    """q, k and v may be one tensor, and a call may be one of several in a graph."""
    plan = rf.plan(rf.causal(), 100, group, block_size=16)
    x = torch.randn(2, 2, 100, 8, dtype=torch.float64)
    alone = rf.create_block_mask(rf.causal(), None, None, 100, 100)
    whole = x.clone().requires_grad_()
    local = plan.shard(x, 2).requires_grad_()
    for leaf, mask in ((whole, alone), (local, plan)):
        y = leaf
        for _ in range(3):
            y = y + rf.flex_attention(y, y, y, block_mask=mask)
        y.square().sum().backward()
    assert whole.grad is not None and local.grad is not None
    torch.testing.assert_close(local.grad, plan.shard(whole.grad, 2), rtol=1e-9, atol=1e-12)


def test_layers_in_a_row(pool: RankPool) -> None:
    pool.run(one_tensor_on_rank, 3)


def checkpointed_on_rank(group: dist.ProcessGroup) -> None:
    plan = rf.plan(rf.causal(), 100, group, block_size=16)
    x = plan.shard(torch.randn(2, 2, 100, 8), 2)
    gradients = []
    for checkpoint in (False, True):
        leaf = x.clone().requires_grad_()
        layer = lambda y: rf.flex_attention(y, y, y, block_mask=plan)
        if checkpoint:
            y = torch.utils.checkpoint.checkpoint(layer, leaf, use_reentrant=False)
        else:
            y = layer(leaf)
        gradients += torch.autograd.grad(y.square().sum(), leaf)
    assert torch.equal(*gradients)


def test_activation_checkpointing(pool: RankPool) -> None:
    pool.run(checkpointed_on_rank, 3)


def poisoned_gradients_on_rank(group: dist.ProcessGroup) -> None:
    """What a loss says about padding slots is of no consequence."""
    case = replace(LEARNED, dtype=torch.float64, seq_len=129)
    problem = case.build()
    for layout, strategy in product(LAYOUTS, STRATEGIES):
        plan = rf.plan(
            problem.mask, case.seq_len, group, layout=layout, strategy=strategy, block_size=16
        )
        local = problem.shard(plan)
        assert local.dlse is not None
        clean = attend(local, plan)
        for garbage in (3.0, torch.nan):
            dout, dlse = local.dout.clone(), local.dlse.clone()
            dout[:, :, ~plan.valid] = garbage
            dlse[:, :, ~plan.valid] = garbage
            assert_same_bits(clean, attend(replace(local, dout=dout, dlse=dlse), plan))


def test_gradients_of_padding_are_ignored(pool: RankPool) -> None:
    pool.run(poisoned_gradients_on_rank, 3)


def test_no_second_derivative() -> None:
    x = torch.randn(1, 1, 20, 8, requires_grad=True)
    loss = rf.flex_attention(x, x, x).square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
