"""plan() and plan_all(): what they choose, what they cost, whom they accept as a group."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import ringflex as rf
from attention_cases import LAYOUTS, MASKS, STRATEGIES, Case, random_documents
from rank_pool import RankPool

BALANCED = ("zigzag", "striped")


def local_and_global() -> dict[str, Callable[..., Tensor]]:
    return {"local": rf.causal() & rf.sliding_window(100), "global": rf.causal()}


def fingerprint(plan: rf.Plan) -> tuple[Any, ...]:
    """All that a plan says, as plain data."""
    steps = [
        [
            [(t.peer, t.of, [b.tolist() for b in t.blocks]) for t in transfers]
            for transfers in (step.receives, step.sends, step.returns, step.collects)
        ]
        + [step.width, step.mask and step.mask.block_map().tolist()]
        for step in plan.steps
    ]
    layout = (plan.layout.name, plan.layout.owner.tolist(), plan.strategy)
    return layout, steps, plan.needs.dense().tolist(), plan.stats, plan.describe()


# How many steps there are.


def test_what_comes_of_many_ranks_in_few_blocks_comes_in_one_step() -> None:
    """Every query sees the first block of each rank: seven arrivals, of one block each."""
    S, W = 8 * 16 * 128, 8
    first = lambda b, h, q, kv: kv % (16 * 128) < 128
    plans = rf.plan_all(first, S, W, layout="contiguous", strategy="direct")
    assert [len(plan.steps) for plan in plans] == [2] * W
    for plan in plans:
        assert [t.count for t in plan.steps[1].receives] == [1] * (W - 1)
        assert {t.peer for t in plan.steps[1].receives} == set(range(W)) - {plan.rank}


def test_a_step_brings_at_most_what_a_rank_holds() -> None:
    S, W, share = 8 * 16 * 128, 8, 16
    some = lambda b, h, q, kv: kv % (16 * 128) < 3 * 128
    machine = rf.Machine(at_once=0)
    for mask, wanted in ((some, [15, 6]), (rf.full(), [share] * 7)):
        for plan in rf.plan_all(
            mask, S, W, layout="contiguous", strategy="direct", machine=machine
        ):
            arrivals = [sum(t.count for t in step.receives) for step in plan.steps[1:]]
            assert arrivals == wanted
            assert sum(arrivals) == sum(plan.stats.blocks_received)


@pytest.mark.parametrize(
    ("at_once", "wanted"), [(40, [32, 32, 32, 16]), (112, [112]), (113, [112])]
)
def test_a_step_may_bring_more(at_once: int, wanted: list[int]) -> None:
    S, machine = 8 * 16 * 128, rf.Machine(at_once=at_once * 128)
    for plan in rf.plan_all(rf.full(), S, 8, strategy="direct", machine=machine):
        assert [sum(t.count for t in step.receives) for step in plan.steps[1:]] == wanted
    slow = rf.Machine(at_once=112 * 128, near=400e9, far=100e9, gpus_per_node=4)
    for plan in rf.plan_all(rf.full(), S, 8, strategy="direct", machine=slow):
        arrivals = [sum(t.count for t in step.receives) for step in plan.steps[1:]]
        assert max(arrivals) <= 112 / 4 and sum(arrivals) == 112


# What is received.


@pytest.mark.parametrize("strategy", ["ring", "direct", "auto"])
def test_a_window_needs_its_left_neighbour_only(strategy: str) -> None:
    """65,536 tokens on 8 ranks are 64 blocks each; a window of 4,096 reaches back 32 blocks."""
    plans = rf.plan_all(
        rf.causal() & rf.sliding_window(4096), 65536, 8, layout="contiguous", strategy=strategy
    )
    for plan in plans:
        assert len(plan.steps) == 2  # the local one, and one that carries something
        received = [(t.peer, t.count) for t in plan.steps[1].receives]
        assert received == ([(plan.rank - 1, 32)] if plan.rank else [])
        assert plan.stats.blocks_received == (0, 32 if plan.rank else 0)
        for transfer in plan.steps[1].sends:  # the last half of what the sender holds
            assert transfer.peer == plan.rank + 1
            assert transfer.blocks[0].tolist() == list(range(32, 64))
        if plan.rank:
            window = np.arange(plan.rank * 64 - 32, plan.rank * 64)
            assert plan.steps[1].mask is not None
            assert (plan.steps[1].mask.kv_starts == window * 128).all()
            assert np.isclose(plan.stats.skipped, 1 - 32 / (7 * 64))
    assert plans[0].steps[1].mask is None
    assert not plans[7].steps[1].sends


def test_documents_that_stay_on_their_rank_are_not_sent() -> None:
    """Ranks 0 and 1 hold whole documents, 2 and 3 one that both need; the ring leads past 0, 1."""
    mask = rf.document_from_lengths([1000, 24, 512, 512, 2048])
    for strategy, received in (("direct", [0, 0, 8, 8]), ("ring", [8, 8, 8, 8])):
        plans = rf.plan_all(mask, 4096, 4, layout="contiguous", strategy=strategy)
        assert [sum(p.stats.blocks_received) for p in plans] == received
        assert [sum(p.stats.gradient_blocks_sent) for p in plans] == [0, 0, 8, 8]


# What is chosen.


def test_auto_layout_keeps_windows_together() -> None:
    plan = rf.plan_all(rf.sliding_window(256, 256), 16384, 8)[0]
    assert plan.layout.name == "contiguous"


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_auto_layout_balances_a_causal_mask(world_size: int) -> None:
    plan = rf.plan_all(rf.causal(), 16384, world_size)[0]
    assert plan.layout.name in BALANCED
    assert plan.stats.imbalance <= 1.05
    assert rf.plan_all(rf.causal(), 16384, world_size, layout="contiguous")[0].stats.imbalance > 1.4


@pytest.mark.parametrize("mask", MASKS)
def test_auto_strategy_keeps_links_busy_for_the_shortest_time(mask: str) -> None:
    """Blocks of the rank with most to move in each step, within a node."""
    case = Case(mask=mask, seq_len=300)
    for layout in LAYOUTS:
        busy = {}
        for strategy in (*STRATEGIES, "auto"):
            plans = rf.plan_all(
                case.mask_mod(), 300, 4,
                B=2, H=4, layout=layout, strategy=strategy, block_size=16,
            )  # fmt: skip
            assert len({p.strategy for p in plans}) == 1
            counts = [np.maximum(p.stats.blocks_received, p.stats.blocks_sent) for p in plans]
            busy[strategy] = int(np.max(counts, axis=0).sum())
        assert busy["auto"] == min(busy["ring"], busy["direct"])


def test_auto_layout_is_never_slower_than_the_best_by_more_than_a_little() -> None:
    for mask in ("causal", "tree", "document", "opposite", "future"):
        case = Case(mask=mask, seq_len=2000)
        slowest = {
            layout: max(rf.plan_all(case.mask_mod(), 2000, 4, layout=layout)[0].stats.work)
            for layout in (*LAYOUTS, "balanced", "auto")
        }
        assert slowest["auto"] <= 1.05 * min(slowest.values())


def plans_on_rank(group: dist.ProcessGroup, case: Case, options: dict[str, Any]) -> tuple[Any, ...]:
    options = {"block_size": case.block_size, **options}
    return fingerprint(rf.plan(case.mask_mod(), case.seq_len, group, B=2, H=4, **options))


@pytest.mark.parametrize("mask", ["causal", "window", "causal documents", "tree", "nothing"])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_ranks_plan_what_one_process_plans(pool: RankPool, mask: str, world_size: int) -> None:
    case = Case(mask=mask, seq_len=500)
    for options in ({}, {"layout": "zigzag", "strategy": "direct"}, {"layout": "balanced"}):
        ranks = pool.run(plans_on_rank, world_size, case, options)
        together = rf.plan_all(case.mask_mod(), 500, world_size, B=2, H=4, block_size=16, **options)
        assert ranks == [fingerprint(plan) for plan in together]
        assert len({(f[0][0], f[0][2]) for f in ranks}) == 1


def dict_on_rank(group: dist.ProcessGroup) -> list[tuple[str, str, list[int], int, str]]:
    plans = rf.plan(local_and_global(), 2048, group, block_size=16)
    assert list(plans) == ["local", "global"]
    assert plans["local"].layout is plans["global"].layout
    assert plans["local"].comm is plans["global"].comm
    shared = plans["global"].layout
    one = rf.plan(rf.causal(), 2048, group, layout=shared, block_size=16)  # a Layout is accepted
    assert one.layout is shared
    return [
        (name, p.layout.name, p.layout.owner.tolist(), sum(p.stats.work), p.strategy)
        for name, p in plans.items()
    ]


def test_a_dict_of_masks_shares_one_layout(pool: RankPool) -> None:
    found = pool.run(dict_on_rank, 4)
    assert all(f == found[0] for f in found)
    local, whole = found[0]
    assert local[1] in BALANCED  # the work of both layers together decides
    assert local[3] < whole[3]


def both_layers_on_rank(group: dist.ProcessGroup) -> None:
    plans = rf.plan(local_and_global(), 300, group, block_size=16)
    x = torch.randn(1, 1, 300, 8, dtype=torch.float64)
    for name, mask in local_and_global().items():
        local = plans["local"].shard(x, 2)  # one shard serves both
        out = plans[name].unshard(rf.flex_attention(local, local, local, block_mask=plans[name]), 2)
        alone = rf.create_block_mask(mask, None, None, 300, 300, BLOCK_SIZE=16)
        expected = rf.flex_attention(x, x, x, block_mask=alone)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


def test_layers_of_both_kinds(pool: RankPool) -> None:
    pool.run(both_layers_on_rank, 3)


# Whom it takes as a group.


def meshes_on_rank(group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    line = init_device_mesh("cpu", (world_size,), mesh_dim_names=("cp",))
    table = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "cp"))
    found = []
    for mesh, peers in ((line, world_size), (table["cp"], world_size // 2), (None, world_size)):
        plan = rf.plan(rf.causal(), 200, mesh, block_size=16)
        assert (plan.world_size, plan.rank) == (peers, rank % peers)
        x = torch.arange(200.0)
        assert torch.equal(plan.unshard(plan.shard(x, 0), 0), x)
        found.append(plan.rank)
    with pytest.raises(ValueError, match=r"must be a 1-D DeviceMesh, got 2 .*'cp'\); pass one"):
        rf.plan(rf.causal(), 200, table)
    return found, table.mesh.tolist()


def test_device_meshes(pool: RankPool) -> None:
    found = pool.run(meshes_on_rank, 8)
    assert [f[0][0] for f in found] == list(range(8))
    assert [f[0][1] for f in found] == [0, 1, 2, 3] * 2


def replicas_on_rank(group: dist.ProcessGroup) -> None:
    """Two data-parallel replicas with documents of their own, each over two ranks."""
    table = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "cp"))
    replica = table.get_local_rank("dp")
    mask = rf.causal() & rf.document(random_documents(200 + replica, replica))
    plan = rf.plan(mask, 200 + replica, table["cp"], block_size=16)
    torch.manual_seed(replica)
    x = torch.randn(1, 1, plan.seq_len, 8, dtype=torch.float64)
    local = plan.shard(x, 2)
    out = plan.unshard(rf.flex_attention(local, local, local, block_mask=plan), 2)
    alone = rf.create_block_mask(mask, None, None, plan.seq_len, plan.seq_len)
    expected = rf.flex_attention(x, x, x, block_mask=alone)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


def test_replicas_plan_apart(pool: RankPool) -> None:
    pool.run(replicas_on_rank, 8)


def odd_ranks_only(group: dist.ProcessGroup) -> int:
    """A group whose ranks are not those of the world."""
    odd = dist.new_group([1, 3, 5])
    if dist.get_rank() not in (1, 3, 5):
        with pytest.raises(ValueError, match="this rank is not a member of the group"):
            rf.plan(rf.causal(), 100, odd)
        return -1
    plan = rf.plan(rf.causal(), 100, odd, block_size=16)
    x = torch.randn(1, 1, 100, 8, requires_grad=True)
    local = plan.shard(x, 2)
    out = rf.flex_attention(local, local, local, block_mask=plan)
    plan.unshard(out, 2).sum().backward()
    return plan.rank


def test_a_group_of_some_ranks(pool: RankPool) -> None:
    assert pool.run(odd_ranks_only, 8) == [-1, 0, -1, 1, -1, 2, -1, -1]


@pytest.mark.parametrize("group", [0, "world", [0, 1], torch.zeros(1)])
def test_what_is_no_group(group: object) -> None:
    message = f"must be a ProcessGroup or a 1-D DeviceMesh, got {type(group).__name__}"
    with pytest.raises(TypeError, match=message):
        rf.plan(rf.causal(), 100, group)


def test_one_process_without_a_group() -> None:
    assert not dist.is_initialized()
    plan = rf.plan(rf.causal(), 100, block_size=16)
    assert (plan.rank, plan.world_size, plan.local_len, plan.comm) == (0, 1, 112, None)
    assert fingerprint(plan) == fingerprint(rf.plan_all(rf.causal(), 100, 1, block_size=16)[0])
    x = torch.randn(1, 1, 100, 8)
    local = plan.shard(x, 2)
    out = plan.unshard(rf.flex_attention(local, local, local, block_mask=plan), 2)
    assert out.shape == x.shape


# What it costs.

COST = """
import json, resource, sys, time, tracemalloc
import torch
import ringflex as rf
from machine_speed import slowness

def mask(seq_len):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(seq_len // 64).log_normal_(6.5, 1.2, generator=generator).long() + 1
    lengths = lengths[: int((lengths.cumsum(0) < seq_len).sum())]
    lengths = torch.cat([lengths, seq_len - lengths.sum(dim=0, keepdim=True)])
    return rf.causal() & rf.sliding_window(4096) & rf.document_from_lengths(lengths)

def resident():  # the peak so far, bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)

options = json.loads(sys.argv[1])
rf.plan_all(mask(8192), 8192, 8, **options)  # imports
slowness()  # and its arrays
million, before, seconds = mask(1 << 20), resident(), []
for _ in range(4):
    slow, start = slowness(), time.process_time()
    plans = rf.plan_all(million, 1 << 20, 8, **options)
    seconds.append((time.process_time() - start) / slow)
grown = resident() - before
tracemalloc.start()
plans = rf.plan_all(million, 1 << 20, 8, **options)
traced = tracemalloc.get_traced_memory()[1]
blocks = [p.stats.blocks_received for p in plans]
print(json.dumps({"seconds": min(seconds), "grown": grown, "traced": traced, "blocks": blocks}))
"""


@pytest.mark.parametrize("options", [{}, {"layout": "contiguous"}], ids=str)
def test_a_million_tokens(options: dict[str, str]) -> None:
    """Planned for all 8 ranks in under a second of one processor and 100 MB; the best of four."""
    command = [sys.executable, "-c", COST, json.dumps(options)]
    one = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    one["OMP_NUM_THREADS"] = "1"  # others would be counted that only wait
    answer = subprocess.run(
        command, env=one, capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, answer.stderr
    cost = json.loads(answer.stdout)
    assert cost["seconds"] < 1.0
    assert cost["traced"] < 100e6
    assert cost["grown"] < 100e6
    if options == {"layout": "contiguous"}:
        assert all(sum(received) <= 32 for received in cost["blocks"])


def test_cost_follows_the_boundary_of_the_mask() -> None:
    """Four times the length costs about four times the time, not sixteen."""

    def seconds(seq_len: int) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            rf.plan_all(rf.causal(), seq_len, 4, layout="contiguous")
            best = min(best, time.process_time() - start)
        return best

    seconds(1024)
    assert seconds(1 << 19) < 8 * seconds(1 << 17)
