"""Heads dealt to the GPUs of a node, the sequence to nodes: the same as any other strategy."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import ringflex as rf
from attention_cases import LAYOUTS, Case, assert_equals_reference, attend
from rank_pool import RankPool
from ringflex.parallel.predict import predict
from ringflex.parallel.prefetch import PlanPrefetcher
from ringflex.reference import Reference

HEADS = Case(
    mask="mixed heads", score="composed", seq_len=203, Hq=8, Hkv=4, B=2, dtype=torch.float64,
    sinks=True, dlse=True, block_size=16,
)  # fmt: skip
CASES = [
    HEADS,
    replace(HEADS, mask="causal documents", score="alibi", sinks=False),
    replace(HEADS, mask="document rows", score=None, dtype=torch.float32, bshd=True),
    replace(HEADS, mask="causal", score="relative", dlse=False, seq_len=16),  # mostly padding
]


def results_on_rank(
    group: dist.ProcessGroup, case: Case, layout: str, gpus: int
) -> tuple[Reference, str]:
    problem = case.build()
    plan = rf.plan(
        problem.mask, case.seq_len, group, B=case.B, H=case.Hq, layout=layout, strategy="ulysses",
        block_size=case.block_size, machine=rf.Machine(gpus_per_node=gpus),
    )  # fmt: skip
    assert plan.comm is not None
    found = attend(problem.shard(plan), plan)
    shape = {
        "batch": case.B, "heads": case.Hq, "kv_heads": case.Hkv, "head_dim": case.D,
        "v_head_dim": case.Dv, "dtype": case.dtype, "backward": True,
    }  # fmt: skip
    assert plan.comm.bytes_sent == plan.stats.bytes_sent(**shape)
    assert plan.comm.bytes_received == plan.stats.bytes_received(**shape)
    shared = [x for x in (found.dsinks, *found.dcaptures) if x is not None]
    for x in shared:
        dist.all_reduce(x, group=group)
    whole = Reference(
        *(plan.unshard(x, 2) for x in found[:5]),
        found.dsinks,
        found.dcaptures,
    )
    return whole, plan.layout.name


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.mask}, {case.score}")
@pytest.mark.parametrize(("world_size", "gpus"), [(2, 2), (4, 2), (4, 1), (4, 8)])
def test_results_equal_the_reference(
    pool: RankPool, case: Case, world_size: int, gpus: int
) -> None:
    layout = [*LAYOUTS, "auto", "balanced", "nested"][(world_size + gpus) % 6]
    for whole, _ in pool.run(results_on_rank, world_size, case, layout, gpus):
        assert_equals_reference(case, whole, f"{layout}, {world_size} ranks, {gpus} a node")


def several_on_rank(group: dist.ProcessGroup) -> None:
    """A dict of masks shares a layout, a prefetcher's plans are those of `rf.plan`, and equal
    requests are planned once."""
    masks = {"local": rf.causal() & rf.sliding_window(20), "global": rf.causal()}
    nodes = {"strategy": "ulysses", "block_size": 16, "machine": rf.Machine(gpus_per_node=2)}
    first, again = (rf.plan(masks, 200, group, **nodes) for _ in range(2))
    assert first["local"].layout.owner.tolist() == first["global"].layout.owner.tolist()
    assert first["local"].nodes is not None and again["local"].nodes is not None
    assert first["local"].nodes.steps is again["local"].nodes.steps
    (_, ahead), *_ = PlanPrefetcher([0], lambda batch: masks, seq_len=200, group=group, **nodes)
    assert ahead["global"].identity == first["global"].identity


def test_plans_of_several_masks(pool: RankPool) -> None:
    pool.run(several_on_rank, 4)


def changing_on_rank(group: dist.ProcessGroup) -> None:
    """A mask by head, whose captured tensor changes while the next batch is planned."""
    reach = torch.tensor([3, 9, 27, 81])
    mask = lambda b, h, q, kv: (q >= kv) & (q - kv < reach[h])
    options = {"strategy": "ulysses", "block_size": 16, "H": 4, "B": 1}

    def batches() -> Iterator[torch.Tensor]:
        for factor in (1, 2, 3):
            yield reach.clone()
            reach.mul_(factor)

    for wanted, plan in PlanPrefetcher(
        batches(), lambda batch: mask, seq_len=96, group=group, **options
    ):
        assert isinstance(plan, rf.Plan) and plan.nodes is not None
        place = dist.get_rank(group)
        mine = plan.nodes.rows.to_dense()[0]
        distance = torch.arange(96)[:, None] - torch.arange(96)
        for h in range(2):
            window = wanted[2 * place + h]
            assert torch.equal(mine[h, :96, :96], (distance >= 0) & (distance < window))


def test_what_masks_capture_may_change_while_others_are_planned(pool: RankPool) -> None:
    pool.run(changing_on_rank, 2)


def mistakes_on_rank(group: dist.ProcessGroup) -> list[str]:
    rank, found = dist.get_rank(group), []

    def plan(gpus: int = 2, strategy: str = "ulysses", ids: int = 0, **more: object) -> rf.Plan:
        documents = torch.arange(64) // 20 + ids
        return rf.plan(
            rf.causal() & rf.document(documents), 64, group, strategy=strategy, block_size=16,
            machine=rf.Machine(gpus_per_node=gpus), **more,
        )  # fmt: skip

    def attend_with(heads: int) -> None:
        x = torch.zeros(1, heads, p.local_len, 8)
        rf.flex_attention(x, x, x, block_mask=p)

    p = plan()
    for wrong in (
        lambda: plan(gpus=3),
        lambda: plan(H=3),
        lambda: plan(layout=p.layout),
        lambda: plan(ids=rank == 1),
        lambda: plan(strategy="ulysses" if rank else "ring"),
        lambda: plan(strategy="auto", shape=SHAPE if rank else None),
        lambda: plan(strategy="auto", shape=SHAPE, ids=rank == 1),
        lambda: plan(shape=replace(SHAPE, kv_heads=1)),
        lambda: plan(strategy="auto", shape=4),
        lambda: plan(gpus=4, ids=rank == 1),
        lambda: attend_with(3),
        lambda: attend_with(2 if rank else 3),
        lambda: p.stats.bytes_sent(
            batch=1, kv_heads=2, head_dim=8, v_head_dim=8, dtype=torch.float32
        ),
    ):
        with pytest.raises((ValueError, TypeError)) as raised:
            wrong()
        found.append(str(raised.value))
    attend_with(4)
    return found


def test_mistakes_are_told_on_every_rank(pool: RankPool) -> None:
    for found in pool.run(mistakes_on_rank, 4):
        expected = [
            "4 ranks are not a multiple of 3", "H=3 is not a multiple", "by name, not a Layout",
            "ranks disagree", "ranks disagree", "ranks disagree", "ranks disagree",
            "4 and 1 of K/V are not multiples", "must be an rf.AttentionShape", "ranks disagree",
            "query has 3", "query has 3",
            "pass heads=",
        ]  # fmt: skip
        for text, part in zip(found, expected, strict=True):
            assert part in text


@pytest.mark.parametrize("layout", [*LAYOUTS, "auto", "balanced"])
@pytest.mark.parametrize(("world_size", "gpus"), [(8, 4), (6, 2), (3, 8), (1, 8)])
def test_all_plans(layout: str, world_size: int, gpus: int) -> None:
    ids = torch.arange(1000) // 300
    machine = rf.Machine(gpus_per_node=gpus, near=1e9, far=1e8)
    plans = rf.plan_all(
        rf.causal() & rf.document(ids), 1000, world_size, layout=layout, strategy="ulysses",
        block_size=16, machine=machine,
    )  # fmt: skip
    held = torch.cat([plan.positions for plan in plans])
    assert held.sort().values.tolist() == list(range(held.numel()))
    assert {plan.local_len for plan in plans} == {held.numel() // world_size}
    shape = rf.AttentionShape(heads=24, kv_heads=12, head_dim=16)
    found = predict(plans, shape, machine)
    for plan in plans:
        assert plan.predict(shape, machine) == found
        assert plan.nodes is not None and plan.strategy in plan.describe()
    swaps = [s for s in found.spans if s.name == "heads"]
    assert len(swaps) == 4 * world_size * (min(gpus, world_size) > 1)
    alone = rf.plan_all(rf.causal() & rf.document(ids), 1000, 1, block_size=16)
    assert found.flops == pytest.approx(predict(alone, shape, machine).flops)


NODES = rf.Machine(gpus_per_node=2, near=1e10, far=1e9, launch=1e-6, latency=1e-6)
SHAPE = rf.AttentionShape(heads=4, kv_heads=2, head_dim=64)
ONE_DOCUMENT, WINDOW = rf.full(), rf.causal() & rf.sliding_window(64)


@pytest.mark.parametrize(
    ("mask", "options", "dealt"),
    [
        (ONE_DOCUMENT, {"shape": SHAPE}, True),
        (WINDOW, {"shape": SHAPE}, False),  # little moves anyway
        (ONE_DOCUMENT, {}, False),  # heads are not known
        (ONE_DOCUMENT, {"shape": replace(SHAPE, kv_heads=1)}, False),
        (ONE_DOCUMENT, {"shape": SHAPE, "H": 3}, False),
        (ONE_DOCUMENT, {"shape": SHAPE, "strategy": "direct"}, False),
        (ONE_DOCUMENT, {"shape": SHAPE, "machine": replace(NODES, gpus_per_node=4)}, False),
        (ONE_DOCUMENT, {"shape": SHAPE, "machine": replace(NODES, gpus_per_node=3)}, False),
    ],
)
def test_auto_deals_heads_where_that_is_faster(
    mask: rf.MaskMod, options: dict[str, Any], dealt: bool
) -> None:
    options = {"machine": NODES, **options}
    plans = rf.plan_all(mask, 8192, 4, **options)
    assert all((plan.strategy == "ulysses") == dealt for plan in plans)
    if dealt:
        machine, shape = options["machine"], options["shape"]
        others = rf.plan_all(mask, 8192, 4, machine=machine)
        assert predict(plans, shape, machine).both < predict(others, shape, machine).both


def auto_on_rank(group: dist.ProcessGroup, shape: rf.AttentionShape) -> list[str]:
    masks = {"local": WINDOW, "global": ONE_DOCUMENT}
    found = [
        rf.plan(ONE_DOCUMENT, 8192, group, machine=NODES, shape=shape),
        rf.plan(WINDOW, 8192, group, machine=NODES, shape=shape),
        *rf.plan(masks, 8192, group, machine=NODES, shape=shape).values(),
    ]
    prefetched = PlanPrefetcher(
        [0], lambda batch: ONE_DOCUMENT, seq_len=8192, group=group, machine=NODES, shape=shape
    )
    found += [plan for _, plan in prefetched]
    with mock.patch.object(rf.Plan, "predict"):  # of equal plans, times are known
        found.append(rf.plan(ONE_DOCUMENT, 8192, group, machine=NODES, shape=shape))
    return [plan.strategy for plan in found]


def test_ranks_choose_alike(pool: RankPool) -> None:
    """Masks of one model are dealt alike: here the heads of both."""
    for found in pool.run(auto_on_rank, 4, SHAPE):
        assert found[:1] + found[2:] == ["ulysses"] * 5 and found[1] != "ulysses"


def evaluated_first_on_rank(group: dist.ProcessGroup, strategy: str) -> bool:
    case = replace(HEADS, mask="causal documents", score="alibi", sinks=False)
    problem = case.build()
    with torch.inference_mode():
        plan = rf.plan(
            problem.mask, case.seq_len, group, B=case.B, strategy=strategy, block_size=16
        )
        shard = problem.shard(plan)
        out = rf.flex_attention(shard.q, shard.k, shard.v, shard.score, plan, enable_gqa=True)
    shard = problem.shard(plan)
    trained = attend(shard, plan)
    return torch.equal(out, trained.out) and bool(trained.dq.isfinite().all())


@pytest.mark.parametrize("strategy", ["ulysses", "direct"])
def test_a_plan_of_inference_mode_serves_training(pool: RankPool, strategy: str) -> None:
    assert pool.run(evaluated_first_on_rank, 2, strategy) == [True] * 2


def test_a_picture(tmp_path: Path) -> None:
    plan = rf.plan_all(
        rf.causal(), 4096, 16, strategy="ulysses", machine=rf.Machine(gpus_per_node=8)
    )[3]
    plan.plot(str(tmp_path / "plan.html"))
    page = (tmp_path / "plan.html").read_text()
    assert "16 ranks" in page and "between 2 nodes" in page and "heads in 8 parts" in page
