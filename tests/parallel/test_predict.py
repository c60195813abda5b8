"""predict(): time lines that can be checked by hand, and what holds for any."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import ringflex as rf
from attention_cases import LAYOUTS, STRATEGIES
from ringflex.parallel.machine import AttentionShape, Machine
from ringflex.parallel.predict import Prediction, Span, predict

SHAPE = AttentionShape(batch=2, heads=4, kv_heads=2, head_dim=64)
MACHINE = Machine(
    forward=1e12, backward=1e12, launch=0.0, near=1e12, far=1e11, latency=0.0, hidden=0.0,
    one_pass=False,
)  # fmt: skip
S = 4096


def spans_of(found: Prediction, rank: int, track: str) -> list[Span]:
    return sorted(
        (s for s in found.spans if (s.rank, s.track) == (rank, track)), key=lambda s: s.start
    )


def test_one_rank_takes_what_its_blocks_take() -> None:
    found = predict(rf.plan_all(rf.full(), S, 1), SHAPE, replace(MACHINE, launch=1e-3))
    pairs = S * S * 2 * 4
    assert found.forward == pytest.approx(4 * 64 * pairs / 1e12 + 1e-3)
    assert found.backward == pytest.approx(10 * 64 * pairs / 1e12 + 1e-3)
    assert found.both == found.forward + found.backward
    assert found.exposed == 0
    assert found.flops == 14 * 64 * pairs


def test_two_ranks_by_hand() -> None:
    """Contiguous and causal: rank 1 sees all of rank 0; links so slow that it waits."""
    plans = rf.plan_all(rf.causal(), S, 2, layout="contiguous", strategy="direct")
    machine = replace(MACHINE, near=1e8, latency=1e-5)
    found = predict(plans, SHAPE, machine)
    half, blocks = S // 2, S // 2 // 128
    diagonal = blocks * (blocks + 1) // 2 * 128 * 128  # a partial block takes as long as a full one
    kernel = 4 * 64 * 2 * 4 / 1e12  # seconds a pair
    transfer = half * 2 * 2 * (64 + 64) * 2 / 1e8 + 1e-5
    local, remote = diagonal * kernel, half * half * kernel
    assert transfer > local
    assert found.forward == pytest.approx(transfer + remote)
    assert [s.name for s in spans_of(found, 0, "compute")] == ["forward", "backward dQ"]
    assert [s.name for s in spans_of(found, 0, "behind")] == ["backward dK, dV"]
    queries, keys = 2.5 * 3 / 7, 2.5 * 4 / 7
    computed = transfer + remote * keys
    home = computed + 2 * (transfer - 1e-5) + 1e-5  # fp32
    own = computed + remote * queries  # the local dK/dV are done while K/V arrive
    assert local * keys < transfer - local * queries
    assert found.backward == pytest.approx(max(home, own))
    waited = (transfer - local) + (transfer - local * 2.5) + max(0, home - own)
    assert found.exposed == pytest.approx(waited)


def test_one_pass_by_hand() -> None:
    """The same in one pass: the local K/V while those of rank 0 come, and dK/dV leave later."""
    plans = rf.plan_all(rf.causal(), S, 2, layout="contiguous", strategy="direct")
    found = predict(plans, SHAPE, replace(MACHINE, near=1e8, latency=1e-5, one_pass=True))
    half, blocks = S // 2, S // 2 // 128
    diagonal = blocks * (blocks + 1) // 2 * 128 * 128
    kernel = 10 * 64 * 2 * 4 / 1e12  # seconds a pair
    transfer = half * 2 * 2 * (64 + 64) * 2 / 1e8 + 1e-5
    local, remote = diagonal * kernel, half * half * kernel
    assert transfer > local
    home = transfer + remote + 2 * (transfer - 1e-5) + 1e-5  # fp32
    assert found.backward == pytest.approx(home)
    for rank in (0, 1):
        (behind,) = spans_of(found, rank, "behind")
        assert behind.end - behind.start == pytest.approx(local)
        names = [s.name for s in spans_of(found, rank, "compute") if s.start >= found.forward]
        assert names == ["backward"] * rank


def test_nodes_are_linked_by_the_slower_link() -> None:
    plans = rf.plan_all(rf.full(), S, 4, strategy="direct")
    inside = predict(plans, SHAPE, replace(MACHINE, near=1e9, far=1e7, gpus_per_node=4))
    across = predict(plans, SHAPE, replace(MACHINE, near=1e9, far=1e7, gpus_per_node=2))
    assert across.forward > 10 * inside.forward


def test_blocks_cross_between_nodes_once() -> None:
    """Full attention, two nodes of four, all of whose time is that between nodes: each GPU brings
    what one of the other node has."""
    fast = {"forward": 1e18, "backward": 1e18, "near": 1e15}
    machine = replace(MACHINE, far=1e7, gpus_per_node=4, **fast)
    directly, relayed = (
        predict(rf.plan_all(rf.full(), S, 8, strategy=s, machine=machine), SHAPE, machine)
        for s in ("direct", "hierarchical")
    )
    transfer = S // 8 * 2 * 2 * 128 * 2 / 1e7
    assert relayed.forward == pytest.approx(transfer, rel=1e-3)
    assert relayed.backward == pytest.approx(3 * transfer, rel=1e-3)  # dK/dV in fp32
    assert directly.forward > 4 * transfer


def test_a_transfer_slows_the_kernel_beside_it() -> None:
    plans = rf.plan_all(rf.full(), S, 2, strategy="direct")
    plain = predict(plans, SHAPE, MACHINE)
    slowed = predict(plans, SHAPE, replace(MACHINE, hidden=0.5))
    transfer = S // 2 * 2 * 2 * 128 * 2 / 1e12
    assert slowed.forward - plain.forward == pytest.approx(0.5 * transfer)


@pytest.mark.parametrize("layout", [*LAYOUTS, "balanced", "nested"])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "hierarchical"])
@pytest.mark.parametrize(
    ("world_size", "per_node", "one_pass"),
    [(2, 1, False), (5, 5, True), (6, 2, False), (6, 2, True)],
)
def test_time_lines_hold_together(
    layout: str, strategy: str, world_size: int, per_node: int, one_pass: bool
) -> None:
    ids = torch.arange(3000) // 700
    mask = rf.causal() & rf.document(ids)
    nodes = replace(MACHINE, gpus_per_node=per_node, one_pass=one_pass)
    plans = rf.plan_all(
        mask, 3000, world_size, layout=layout, strategy=strategy, block_size=64, machine=nodes
    )
    found = predict(plans, SHAPE, replace(nodes, near=1e9, latency=1e-5, launch=1e-5))
    for rank, plan in enumerate(plans):
        computed = spans_of(found, rank, "compute")
        for one, following in pairwise(computed):
            assert following.start >= one.end - 1e-12
        left_behind = plan.steps[0].mask is not None
        assert len(spans_of(found, rank, "behind")) == left_behind
        for number, step in enumerate(plan.steps):
            for way in (False, True):  # forward, backward
                mine = [s for s in computed if s.step == number and (s.name != "forward") == way]
                kernels = 2 if way and number and not one_pass else 1
                if way and not number and one_pass:
                    kernels = 0
                assert len(mine) == (step.mask is not None) * kernels
                arrivals = [
                    s.end for s in spans_of(found, rank, "transfer")
                    if (s.name, s.step, s.start >= found.forward) == ("K/V", number, way)
                ]  # fmt: skip
                assert bool(arrivals) == bool(step.receives or step.sends)
                if mine and step.receives:
                    assert mine[0].start >= arrivals[0] - 1e-12
    work = sum(plans[0].stats.work) * 64 * 64 * SHAPE.batch * SHAPE.heads
    assert found.flops == pytest.approx(14 * 64 * work)
    fast = predict(plans, SHAPE, replace(nodes, near=1e30, far=1e30, launch=0))
    most = max(plans[0].stats.work) * 64 * 64 * SHAPE.batch * SHAPE.heads
    # Ranks with little work wait for those with much to pass K/V on, for all of a longer kernel.
    assert fast.both == pytest.approx(14 * 64 * most / 1e12, rel=0.5)
    assert fast.both <= found.both


@pytest.mark.parametrize("layout", [*LAYOUTS, "nested"])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "hierarchical"])
def test_one_rank_predicts_what_all_plans_say(layout: str, strategy: str) -> None:
    ids = torch.stack([torch.arange(3000) // 700, torch.arange(3000) // 1300])
    masks = (rf.causal() & rf.document(ids), lambda b, h, q, k: (q >= k) & (q - k <= 300 * (h + 1)))
    for mask, B, H in zip(masks, (2, None), (None, SHAPE.heads), strict=True):
        machine = replace(MACHINE, gpus_per_node=2, near=1e9, far=1e8)
        plans = rf.plan_all(
            mask, 3000, 6, B=B, H=H, layout=layout, strategy=strategy, block_size=64,
            machine=machine,
        )  # fmt: skip
        shape = replace(SHAPE, batch=2)
        expected = predict(plans, shape, machine)
        for plan in (plans[0], plans[4]):
            assert plan.predict(shape, machine) == expected
    alone = rf.plan_all(rf.causal(), 3000, 1)
    assert alone[0].predict() == predict(alone)


def test_bad_input_is_refused() -> None:
    plans = rf.plan_all(rf.causal(), S, 2)
    with pytest.raises(ValueError, match="plans of all ranks"):
        predict(plans[:1])
    with pytest.raises(ValueError, match="near must be positive"):
        Machine(near=0)
    with pytest.raises(ValueError, match="latency must not be negative"):
        Machine(latency=-1)
    for bad in (2.0, True):
        with pytest.raises(ValueError, match=f"gpus_per_node must be an int, got {bad}"):
            Machine(gpus_per_node=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kv_heads must be a positive int, got 0"):
        AttentionShape(kv_heads=0)
    with pytest.raises(ValueError, match="32 heads are not a multiple of 5 of K/V"):
        AttentionShape(kv_heads=5)
    with pytest.raises(ValueError, match="32 and 8 of K/V are not multiples"):
        AttentionShape().share(3)
