"""How long transfers keep links busy, and which share a round."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringflex as rf
from attention_cases import LAYOUTS, MASKS, Case
from ringflex.parallel.links import Costs
from ringflex.parallel.needs import Reads
from ringflex.parallel.rounds import Transfers


@given(
    n=st.integers(1, 9), parts=st.integers(1, 3), room=st.integers(1, 12),
    density=st.floats(0, 1), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_rounds_of_any_loads(n: int, parts: int, room: int, density: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    loads = random.integers(0, room + 2, (n, n, parts)) * (random.random((n, n, 1)) < density)
    loads[np.arange(n), np.arange(n)] = 0
    transfers, sends = Transfers.of(loads), 2 * room
    whole = np.zeros_like(loads)
    whole[transfers.reader, transfers.source] = transfers.load
    assert (whole == loads).all()
    by_distance, one_by_one = transfers.by_distance(room), transfers.one_by_one(room, sends)
    for number in (by_distance, one_by_one):
        assert set(number.tolist()) == set(range(1, int(number.max(initial=0)) + 1))
        for k, (came, gone) in enumerate(transfers.sums(number), start=1):
            now = np.zeros_like(loads)
            some = number == k
            now[transfers.reader[some], transfers.source[some]] = transfers.load[some]
            assert (now.sum(axis=1) == came).all() and (now.sum(axis=0) == gone).all()
            for reader in now:
                assert (reader.sum(axis=0) <= room).all() or np.count_nonzero(reader.any(1)) == 1
            for source in now.transpose(1, 0, 2) if number is one_by_one else ():
                alone = np.count_nonzero(source.any(axis=1)) == 1
                assert (source.sum(axis=0) <= sends).all() or alone
    if (loads <= room).all():
        unbounded = transfers.one_by_one(room, n * room)
        assert unbounded.max(initial=0) <= by_distance.max(initial=0)


def test_what_is_read_far_away_need_not_wait() -> None:
    """Ranks 1 and 3 read of two ranks each: two rounds, though three distances are in use."""
    loads = np.zeros((6, 6, 1), dtype=np.int64)
    loads[1, 0] = loads[1, 5] = loads[3, 1] = loads[3, 0] = 4
    transfers = Transfers.of(loads)
    assert transfers.by_distance(4).tolist() == [1, 2, 2, 3]
    assert transfers.one_by_one(4, 4).tolist() == [1, 2, 1, 2]
    loads[4, 0] = 4  # rank 0 sends three times
    assert Transfers.of(loads).one_by_one(4, 4).max() == 3
    assert Transfers.of(loads).one_by_one(4, 8).max() == 2


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("strategy", ["direct", "hierarchical"])
def test_links_are_busy_as_long_as_the_steps_say(strategy: str, data: st.DataObject) -> None:
    """What is estimated before there are plans, from the transfers of all plans."""
    per_node, nodes = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    W = per_node * nodes
    case = Case(
        mask=data.draw(st.sampled_from(list(MASKS))), seq_len=data.draw(st.integers(1, 600))
    )
    at_once = data.draw(st.sampled_from([0, 64, 1000]))
    machine = rf.Machine(gpus_per_node=per_node, at_once=at_once)
    plans = rf.plan_all(
        case.mask_mod(), case.seq_len, W, B=case.B, H=case.Hq, block_size=16, strategy=strategy,
        layout=data.draw(st.sampled_from(LAYOUTS)), machine=machine,
    )  # fmt: skip
    costs, layout = Costs.of(machine, 16), plans[0].layout
    reads = Reads(layout, plans[0].needs, costs)
    estimated = (reads.direct if strategy == "direct" else reads.relayed).busy
    total = 0.0
    for steps in zip(*(plan.steps for plan in plans)):
        moved = np.zeros((2, 2, W))  # [received, sent], [near, far]
        for rank, step in enumerate(steps):
            for way, transfers in enumerate((step.receives, step.sends)):
                for t in transfers:
                    moved[way, int(t.peer // per_node != rank // per_node), rank] += t.count
        total += max(costs.near * moved[:, 0].max(), costs.far * moved[:, 1].max())
    exchanges = sum(any(s.receives for s in steps) for steps in zip(*(p.steps for p in plans)))
    if strategy == "hierarchical":  # it ends with an exchange within nodes
        exchanges = len(reads.relayed) + 1
    assert estimated == pytest.approx(total + exchanges * costs.begin)


@pytest.mark.parametrize(
    ("mask", "layout", "W", "expected"),
    [
        (rf.causal(), "zigzag", 8, "ring"),
        (rf.causal(), "zigzag", 16, "hierarchical"),
        (rf.causal() & rf.sliding_window(256), "contiguous", 16, "ring"),
        (rf.causal() & rf.document(torch.arange(16384) // 1100), "contiguous", 4, "ring"),
        (rf.causal() & rf.document(torch.arange(16384) // 1100), "zigzag", 4, "direct"),
    ],
)  # fmt: skip
def test_the_strategy_follows_from_what_moves(
    mask: rf.MaskMod, layout: str, W: int, expected: str
) -> None:
    plans = rf.plan_all(mask, 16384, W, layout=layout, machine=rf.Machine(at_once=0))
    assert {plan.strategy for plan in plans} == {expected}


def test_where_ranks_hold_little_few_steps_are_best() -> None:
    assert rf.plan_all(rf.causal(), 16384, 8, layout="zigzag")[0].strategy == "direct"


def test_relays_need_whole_nodes() -> None:
    plans = rf.plan_all(rf.causal(), 16384, 12, layout="zigzag")
    assert plans[0].strategy != "hierarchical"
