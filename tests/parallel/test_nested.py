"""Layouts for machines of several nodes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringflex as rf
from ringflex.parallel.machine import Machine
from ringflex.parallel.nested import by_pieces, by_windows
from ringflex.parallel.predict import predict
from ringflex.parallel.swaps import Problem

TOKENS = 65536
MACHINE = Machine()


def giant_document(tokens: int) -> rf.MaskMod:
    """Most of the work is that of one document, which is 1.5 ranks of 16 long."""
    lengths = [tokens // 16 * 3 // 2, *[tokens // 64] * 58]
    lengths.append(tokens - sum(lengths))
    return rf.causal() & rf.document_from_lengths(lengths)


def test_a_nested_layout_keeps_a_giant_document_within_a_node() -> None:
    mask, W = giant_document(TOKENS), 16
    far = {}
    for layout in ("balanced", "nested"):
        plans = rf.plan_all(mask, TOKENS, W, layout=layout, machine=replace(MACHINE, far=1e9))
        owner = plans[0].layout.owner
        assert sorted(np.bincount(owner)) == [owner.size // W] * W
        needs = plans[0].needs.dense()[:, 0]
        nodes = np.arange(W)[:, None] // 8 != owner[None] // 8
        far[layout] = (needs & nodes).sum(axis=1).max()
    assert far["nested"] <= far["balanced"] / 4
    assert far["balanced"] > 0


@pytest.mark.parametrize("world_size", [3, 8, 9, 17, 24])
@pytest.mark.parametrize("tokens", [1, 129, 4099, 20_000])
def test_nested_covers_every_token_once(world_size: int, tokens: int) -> None:
    ids = torch.arange(tokens) // 700
    plans = rf.plan_all(rf.causal() & rf.document(ids), tokens, world_size, layout="nested")
    positions = torch.cat([plan.positions[plan.valid] for plan in plans])
    assert sorted(positions.tolist()) == list(range(tokens))
    assert {plan.layout.name for plan in plans} == {"nested"}
    assert len({plan.local_len for plan in plans}) == 1


def test_auto_weighs_links() -> None:
    """With slow links between nodes, what keeps the giant document together is done first."""
    mask, W = giant_document(TOKENS), 16
    slow, fast = replace(MACHINE, far=2e9), replace(MACHINE, gpus_per_node=16)
    chosen = {
        name: rf.plan_all(mask, TOKENS, W, layout="auto", machine=machine)
        for name, machine in (("slow", slow), ("fast", fast))
    }
    assert chosen["slow"][0].layout.name == "nested"
    assert chosen["fast"][0].layout.name == "balanced"
    times = {name: predict(plans, machine=slow).both for name, plans in chosen.items()}
    assert times["slow"] < times["fast"]


@settings(max_examples=40)
@given(
    nodes=st.integers(1, 4), node=st.integers(1, 4), share=st.integers(1, 9),
    documents=st.integers(1, 20), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_equal_shares_of_any_documents(
    nodes: int, node: int, share: int, documents: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    C, W = nodes * node * share, nodes * node
    ids = np.sort(random.integers(0, documents, C))
    need = (ids[:, None] == ids) & (np.arange(C)[:, None] >= np.arange(C))
    problem = Problem(need.sum(axis=1) * random.integers(1, 3), need, W, 1)
    for owner in (by_pieces(problem, node), by_windows(problem, node, 1.0)):
        assert (np.bincount(owner, minlength=W) == share).all()


def test_a_document_of_several_nodes_is_parted_evenly() -> None:
    """Half of all work, on 4 nodes of 4: two nodes share it, and all ranks of those alike."""
    node, W, share = 4, 16, 32
    long = 200
    ids = np.concatenate([np.zeros(long, int), 1 + np.arange(W * share - long) // 40])
    index = np.arange(ids.size)
    need = (ids[:, None] == ids) & (index[:, None] >= index)
    work = need.sum(axis=1)
    work[ids > 0] *= -(-int(work[ids == 0].sum()) // int(work[ids > 0].sum()))
    owner = by_pieces(Problem(work, need, W, 1), node)
    holds = np.bincount(owner[:long], minlength=W)
    taken = holds.reshape(-1, node).sum(axis=1) > 0
    assert 2 <= taken.sum() <= 3
    shares = holds.reshape(-1, node)[taken]
    assert (shares == shares[0, 0]).all()
    per_node = np.bincount(owner // node, work)
    assert per_node.max() <= 1.1 * per_node.mean()
    nodes_of = [np.unique(owner[ids == d] // node).size for d in range(1, int(ids.max()) + 1)]
    assert sum(nodes > 1 for nodes in nodes_of) < W // node  # where no node had room for the whole
