"""Plan: what a rank holds of a tensor, and what it says about itself."""

import copy
import math
import pickle
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ringflex as rf
from attention_cases import LAYOUTS, STRATEGIES, random_documents
from rank_pool import RankPool

LENGTHS = [1, 16, 17, 96, 129, 1000]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool]


def plans_of(seq_len: int, world_size: int, layout: str) -> list[rf.Plan]:
    return rf.plan_all(rf.causal(), seq_len, world_size, layout=layout, block_size=16)


@settings(max_examples=40)
@given(layout=st.sampled_from(LAYOUTS), seq_len=st.integers(1, 200), world_size=st.integers(1, 9))
def test_shards_hold_every_token_once(layout: str, seq_len: int, world_size: int) -> None:
    tokens = torch.arange(1, seq_len + 1)
    found = []
    for plan in plans_of(seq_len, world_size, layout):
        shard = plan.shard(tokens, 0)
        assert shard.shape == plan.positions.shape == plan.valid.shape == (plan.local_len,)
        assert torch.equal(shard[plan.valid], plan.positions[plan.valid] + 1)
        assert (shard[~plan.valid] == 0).all()
        assert (plan.positions.diff() > 0).all()
        assert torch.equal(plan.valid, plan.positions < seq_len)
        found.append(shard[plan.valid])
    assert torch.equal(torch.cat(found).sort().values, tokens)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_shard_in_every_dimension(dim: int) -> None:
    shape = [5, 6, 7]
    shape[dim] = 50
    x = torch.randn(shape)
    for plan in plans_of(50, 3, "zigzag"):
        shard = plan.shard(x, dim)
        assert torch.equal(
            shard.index_select(dim, plan.valid.nonzero()[:, 0]),
            x.index_select(dim, plan.positions[plan.valid]),
        )


def test_padding_gets_the_fill() -> None:
    labels = torch.arange(50)[None].expand(2, 50)
    for plan in plans_of(50, 3, "striped"):
        shard = plan.shard(labels, 1, fill=-100)
        assert (shard[:, ~plan.valid] == -100).all()
        assert (shard[:, plan.valid] >= 0).all()
    whole_blocks = plans_of(96, 3, "striped")[0]
    assert whole_blocks.valid.all()
    assert torch.equal(whole_blocks.shard(torch.ones(96), 0, fill=9), torch.ones(32))


def test_a_fill_that_the_dtype_does_not_have_is_refused() -> None:
    plan = rf.plan_all(rf.full(), 100, 2, layout="contiguous", block_size=16)[1]
    for fill in (0.5, float("nan")):
        with pytest.raises(ValueError, match=r"shard\(fill=.*\) of a tensor of torch.int64"):
            plan.shard(torch.arange(100), 0, fill=fill)
        assert plan.shard(torch.zeros(100), 0, fill=fill).shape == (plan.local_len,)


def test_modules_that_hold_plans_and_masks_can_be_copied() -> None:
    plan = rf.plan_all(rf.causal(), 100, 2)[0]
    mask = rf.create_block_mask(rf.causal(), None, None, 100, 100)
    for held in (plan, mask):
        assert copy.deepcopy([held])[0] is copy.copy(held) is held
        with pytest.raises(TypeError, match=f"a {type(held).__name__} cannot be pickled"):
            pickle.dumps(held)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shard_is_differentiable(layout: str) -> None:
    x = torch.randn(2, 50, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    loss = torch.zeros((), dtype=torch.float64)
    for plan in plans_of(50, 4, layout):
        loss = loss + (plan.shard(x, 1, fill=7) * plan.shard(weight, 1, fill=5)).sum()
    (dx,) = torch.autograd.grad(loss, x)
    assert torch.equal(dx, weight)


@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 49), 1), ((2, 50), 0), ((2, 50), 2), ((2, 50), -3), ((), 0)]
)
def test_shard_wants_the_whole_sequence(shape: tuple[int, ...], dim: int) -> None:
    plan = plans_of(50, 3, "contiguous")[1]
    with pytest.raises(ValueError) as caught:
        plan.shard(torch.zeros(shape), dim)
    assert str(caught.value) == (
        f"shard(x, dim={dim}) wants the whole sequence, 50 tokens in that dimension; "
        f"got shape {shape}"
    )


def round_trips_on_rank(group: dist.ProcessGroup, seq_len: int, layouts: tuple[str, ...]) -> None:
    for layout in layouts:
        plan = rf.plan(rf.causal(), seq_len, group, layout=layout, block_size=16)
        for dtype in DTYPES:
            x = torch.randn(seq_len, 3, 2).mul(10).to(dtype)
            assert torch.equal(plan.unshard(plan.shard(x, 0, fill=1), 0), x), dtype
        for dim in (1, 2, -1):
            x = torch.randn(seq_len, 2, 3, 4).movedim(0, dim)
            shard = plan.shard(x, dim)
            assert torch.equal(plan.unshard(shard, dim), x)
            assert torch.equal(plan.unshard(shard.mT.contiguous().mT, dim), x)  # any strides


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_unshard_undoes_shard(pool: RankPool, world_size: int) -> None:
    for seq_len in LENGTHS:
        pool.run(round_trips_on_rank, world_size, seq_len, LAYOUTS)


def unshard_gradient_on_rank(
    group: dist.ProcessGroup, layout: str, weights: Tensor, dtype: torch.dtype
) -> None:
    """Every rank has a loss of its own on the whole sequence."""
    plan = rf.plan(rf.causal(), weights.shape[2], group, layout=layout, block_size=16)
    x = torch.randn(3, plan.local_len, dtype=dtype, requires_grad=True)
    (plan.unshard(x, 1) * weights[plan.rank].to(dtype)).sum().backward()
    expected = plan.shard(weights.sum(0).to(dtype), 1)  # of small integers: exact
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_gradient_of_unshard_sums_over_ranks(
    pool: RankPool, world_size: int, dtype: torch.dtype
) -> None:
    for layout in LAYOUTS:
        weights = torch.randint(-8, 8, (world_size, 3, 100)).double()
        pool.run(unshard_gradient_on_rank, world_size, layout, weights, dtype)


def loss_through_shards_on_rank(group: dist.ProcessGroup, layout: str) -> None:
    """tokens -> shard -> attention -> unshard -> loss: the gradient of one process, summed."""
    plan = rf.plan(rf.causal(), 50, group, layout=layout, block_size=16)
    alone = rf.create_block_mask(rf.causal(), None, None, 50, 50, BLOCK_SIZE=16)
    x = torch.randn(1, 2, 50, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    out = rf.flex_attention(x, x, x, block_mask=alone)
    (expected,) = torch.autograd.grad((out * weight).sum(), x)
    local = plan.shard(x, 2)
    out = plan.unshard(rf.flex_attention(local, local, local, block_mask=plan), 2)
    # The loss is computed on every rank: a share of it for each.
    (dx,) = torch.autograd.grad((out * weight).sum() / plan.world_size, x)
    dist.all_reduce(dx, group=group)
    torch.testing.assert_close(dx, expected, rtol=1e-9, atol=1e-12)


def test_shard_attention_unshard(pool: RankPool) -> None:
    for layout in LAYOUTS:
        pool.run(loss_through_shards_on_rank, 3, layout)


def wrong_unshard_on_rank(group: dist.ProcessGroup) -> None:
    plan = rf.plan(rf.causal(), 100, group, block_size=16)
    plan.unshard(torch.zeros(100), 0)


def test_unshard_wants_the_local_slots(pool: RankPool) -> None:
    for error in pool.errors(wrong_unshard_on_rank, 2, timeout=30):
        assert isinstance(error, ValueError)
        assert "wants this rank's 64 slots in that dimension; got shape (100,)" in str(error)


def test_unshard_without_a_group() -> None:
    plan = plans_of(50, 3, "contiguous")[1]
    with pytest.raises(ValueError, match=r"plan of 3 ranks was made without a process group"):
        plan.unshard(torch.zeros(plan.local_len), 0)
    alone = plans_of(50, 1, "contiguous")[0]
    assert torch.equal(alone.unshard(torch.arange(64), 0), torch.arange(50))


def test_stats() -> None:
    """128 causal tokens in blocks of 16 on 4 ranks: small enough to count by hand."""
    plans = rf.plan_all(
        rf.causal(), 128, 4, layout="contiguous", strategy="direct", block_size=16,
        machine=rf.Machine(at_once=0),
    )  # fmt: skip
    stats = plans[2].stats
    assert stats.work == (3, 7, 11, 15)
    assert stats.imbalance == 15 / 9
    assert stats.blocks_received == (0, 2, 2, 0)
    assert stats.blocks_sent == (0, 2, 0, 0)
    assert stats.gradient_blocks_received == (0, 2, 0, 0)
    assert stats.gradient_blocks_sent == (0, 2, 2, 0)
    assert stats.remote_blocks == 6
    assert math.isclose(stats.skipped, 1 / 3)
    tensor = {"batch": 3, "kv_heads": 5, "head_dim": 8, "v_head_dim": 4}
    a_block = 3 * 5 * 16 * (8 + 4)  # elements of K and V
    assert stats.bytes_received(**tensor, dtype=torch.bfloat16) == 4 * a_block * 2
    # Backward: K/V once more in bf16, and the gradients of two blocks come in fp32.
    assert stats.bytes_received(**tensor, dtype=torch.bfloat16, backward=True) == (
        4 * a_block * 2 * 2 + 2 * a_block * 4
    )
    assert stats.bytes_sent(**tensor, dtype=torch.float64, backward=True) == (
        2 * a_block * 8 * 2 + 4 * a_block * 8
    )
    one = rf.plan_all(rf.causal(), 128, 1)[0].stats
    assert (one.skipped, one.imbalance, one.remote_blocks) == (0, 1, 0)


def test_describe() -> None:
    plan = rf.plan_all(
        rf.causal(), 128, 4, layout="contiguous", strategy="direct", block_size=16,
        machine=rf.Machine(at_once=0),
    )[2]  # fmt: skip
    assert plan.describe().splitlines() == [
        "rank 2 of 4: 128 tokens, layout contiguous, strategy direct, blocks of 16",
        "work 11 visible blocks, slowest rank 1.67x the mean; 33.3% of remote K/V never received",
        "step 0: computes 3 blocks",
        "step 1: computes 4 blocks; K/V 2 from 1, 2 to 3",
        "step 2: computes 4 blocks; K/V 2 from 0",
        "step 3: computes 0 blocks",
    ]


@pytest.mark.parametrize("world_size", [1, 4, 12])
def test_plot(world_size: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mask = rf.causal() & rf.document(random_documents(500, 1))
    plan = rf.plan_all(mask, 500, world_size, block_size=16)[0]
    plan.plot(str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plot_as_a_page(tmp_path: Path) -> None:
    """A page that is well-formed, holds plan and picture, and refers to nothing else."""
    pytest.importorskip("matplotlib")
    mask = rf.causal() & rf.document(random_documents(500, 1))
    plan = rf.plan_all(mask, 500, 4, block_size=16)[1]
    path = tmp_path / "plan.html"
    plan.plot(str(path))
    page = ElementTree.fromstring(path.read_text().removeprefix("<!DOCTYPE html>"))
    assert page.findtext("head/title") == plan.rows.mask.name
    assert page.findtext("body/pre") == plan.describe()
    drawing = page.find("body/{http://www.w3.org/2000/svg}svg")
    assert drawing is not None
    links = [v for x in drawing.iter() for k, v in x.attrib.items() if k.endswith("href")]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert not list(page.iter("script")) and not list(page.iter("link"))


def test_every_layout_and_strategy_has_a_plan() -> None:
    for layout, strategy in product(LAYOUTS, STRATEGIES):
        plan = rf.plan_all(rf.full(), 100, 2, layout=layout, strategy=strategy, block_size=16)[1]
        assert (plan.layout.name, plan.strategy) == (layout, strategy)
        assert (plan.rank, plan.world_size, plan.seq_len, plan.comm) == (1, 2, 100, None)
