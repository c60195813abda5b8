"""Plans as data: the steps of all ranks, played out in one process without a tensor.

Buffers hold the global numbers of blocks in place of keys and values. What a plan says about
positions in a buffer is checked by what stands there.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringflex as rf
from attention_cases import LAYOUTS, MASKS, STRATEGIES, Case, dense_mask
from ringflex.masks.runs import Array
from ringflex.parallel.steps import Step, Transfer

Buffer = list[Array]  # global block numbers, one array for each batch element of the mask


def read(buffer: Buffer, transfer: Transfer) -> list[list[int]]:
    assert len(buffer) == len(transfer.blocks)
    assert transfer.count > 0
    for held, positions in zip(buffer, transfer.blocks):
        assert (np.diff(positions) > 0).all()
        assert positions.size == 0 or 0 <= positions[0] <= positions[-1] < held.size
    return [held[positions].tolist() for held, positions in zip(buffer, transfer.blocks)]


def by_pair(
    transfers: Sequence[Sequence[Transfer]], every: Sequence[Sequence[Buffer]], *, outgoing: bool
) -> dict[tuple[int, int], list[list[list[int]]]]:
    """Messages of one step by (from, to), in the order in which that rank lists them.

    Args:
        every: of each step, what ranks hold.
    """
    messages: dict[tuple[int, int], list[list[list[int]]]] = {}
    for rank, of_rank in enumerate(transfers):
        for transfer in of_rank:
            assert transfer.peer != rank
            pair = (rank, transfer.peer) if outgoing else (transfer.peer, rank)
            messages.setdefault(pair, []).append(read(every[transfer.of][rank], transfer))
    return messages


def play(plans: list[rf.Plan]) -> None:
    """Plays the steps of all ranks and checks each against its peers and the mask."""
    layout, groups = plans[0].layout, plans[0].needs.groups
    local: list[Buffer] = [[layout.blocks_of(p.rank)] * groups for p in plans]
    every: list[list[Buffer]] = [local]  # of each step, what ranks hold
    assert len({len(p.steps) for p in plans}) == 1
    needs = plans[0].needs.dense()
    remote = layout.owner[None, :] != np.arange(layout.world_size)[:, None]  # [W, blocks]
    remote_needs = needs & remote[:, None]
    seen = [np.zeros_like(p.rows.block_map()) for p in plans]
    shares: list[list[Shares]] = []  # of each step and rank
    under_way: list[tuple[Shares, int, Array, Array]] = []
    for i, steps in enumerate(zip(*(p.steps for p in plans))):
        if i == 0:
            assert not any(s.receives or s.sends or s.returns or s.collects for s in steps)
            assert all(s.width == layout.blocks // layout.world_size for s in steps)
        else:
            every.append(arrive(plans, i, every))
        for plan, step, buffer in zip(plans, steps, every[i]):
            if step.mask is not None:
                look(plan, step.mask, buffer, seen[plan.rank])
        shares.append([own_shares(p.rank, b, remote_needs) for p, b in zip(plans, every[i])])
        # Gradients of the same blocks leave and come in.
        out = by_pair([s.returns for s in steps], every, outgoing=True)
        assert out == by_pair([s.collects for s in steps], every, outgoing=False)
        # What came with the exchange before is added, each rank's share once, and may leave now.
        settle(under_way)
        under_way = travel(steps, shares)
    settle(under_way)
    for rank, home in enumerate(shares[0]):
        for group, there in enumerate(home):
            blocks = every[0][rank][group]
            assert (there == remote_needs[:, group, blocks].T).all()
    for plan in plans:
        assert (seen[plan.rank] == plan.rows.block_map()).all()


Shares = list[Array]  # per batch element, [blocks, W]: whose share a block's gradient has


def own_shares(rank: int, buffer: Buffer, needs: Array) -> Shares:
    shares = [np.zeros((blocks.size, needs.shape[0]), dtype=bool) for blocks in buffer]
    for group, blocks in enumerate(buffer):
        filled = blocks >= 0
        shares[group][filled, rank] = needs[rank, group, blocks[filled]]
    return shares


def travel(
    steps: Sequence[Step], shares: Sequence[Sequence[Shares]]
) -> list[tuple[Shares, int, Array, Array]]:
    """What an exchange of gradients adds: to which shares, of which batch element, where, what."""
    sent: dict[tuple[int, int], list[list[Array]]] = {}
    for rank, step in enumerate(steps):
        for t in step.returns:
            parts = [part[at] for part, at in zip(shares[t.of][rank], t.blocks)]
            sent.setdefault((rank, t.peer), []).append(parts)
    added = []
    for rank, step in enumerate(steps):
        for t in step.collects:
            parts = sent[t.peer, rank].pop(0)
            for group, (at, part) in enumerate(zip(t.blocks, parts)):
                added.append((shares[t.of][rank], group, at, part))
    return added


def settle(added: Sequence[tuple[Shares, int, Array, Array]]) -> None:
    for shares, group, at, part in added:
        assert part.any(axis=1).all()  # nothing without a share is sent
        assert not (shares[group][at] & part).any()
        shares[group][at] |= part


def arrive(plans: list[rf.Plan], i: int, every: list[list[Buffer]]) -> list[Buffer]:
    """What the buffers of step `i` hold; every receive has its send."""
    steps = [p.steps[i] for p in plans]
    sent = by_pair([s.sends for s in steps], every, outgoing=True)
    arrived: list[Buffer] = []
    for plan, step in zip(plans, steps):
        buffer = [np.full(step.width, -1) for _ in range(plans[0].needs.groups)]
        for transfer in step.receives:
            assert transfer.count > 0
            message = sent[transfer.peer, plan.rank].pop(0)
            for part, positions, blocks in zip(buffer, transfer.blocks, message, strict=True):
                assert positions.size == len(blocks)
                assert (part[positions] == -1).all()  # nothing is written twice
                part[positions] = blocks
        arrived.append(buffer)
    assert not any(sent.values())  # every send has its receive
    return arrived


def look(plan: rf.Plan, mask: rf.BlockMask, buffer: Buffer, seen: Array) -> None:
    """Adds the blocks that the mask of a step sees, by their global numbers, to `seen`."""
    size = plan.layout.block_size
    states = mask.block_map()  # [B, H, rows, width]
    assert (mask.q_starts == plan.layout.blocks_of(plan.rank) * size).all()
    assert mask.kv_len == mask.kv_blocks * size
    for group, blocks in enumerate(buffer):
        starts = mask.kv_starts[group % mask.kv_starts.shape[0]]
        filled = blocks >= 0
        assert (starts[filled] == blocks[filled] * size).all()
        assert (starts[~filled] >= plan.seq_len).all()  # padding, to the kernels
        assert not states[group][..., ~filled].any()
        assert not seen[group][..., blocks[filled]][states[group][..., filled] > 0].any()
        seen[group][..., blocks[filled]] += states[group][..., filled]


def check_needs(case: Case, plans: list[rf.Plan], per_node: int = 8) -> None:
    """What is needed, sent and counted, against the dense mask."""
    W, layout, size = plans[0].world_size, plans[0].layout, case.block_size
    groups = plans[0].needs.groups
    padded = layout.blocks * size
    dense = np.zeros((case.B, padded, padded), dtype=bool)
    dense[:, : case.seq_len, : case.seq_len] = dense_mask(case).any(dim=1).numpy()
    blocks = dense.reshape(case.B, layout.blocks, size, layout.blocks, size).any(axis=(2, 4))
    needed = np.stack([blocks[:, layout.blocks_of(r)].any(axis=1) for r in range(W)])
    assert groups in (1, case.B)
    if groups == 1:  # the mask is common to the batch
        assert (needed == needed[:, :1]).all()
    needed = needed[:, :groups]
    assert (plans[0].needs.dense() == needed).all()

    owned = layout.owner[None, :] == np.arange(W)[:, None]
    real = int((np.arange(layout.blocks) < layout.real_blocks).sum())
    for plan in plans:
        rank, stats = plan.rank, plan.stats
        received = {
            "direct": needed[rank] & ~owned[rank],
            "all_gather": np.broadcast_to(~owned[rank], needed[rank].shape),
            "ring": np.zeros_like(needed[rank]),
        }
        received["all_gather"] = received["all_gather"] & (np.arange(layout.blocks) < real)
        for d in range(1, W):  # a block passes through a rank if a rank from there on needs it
            owner = (rank - d) % W
            further = [(owner + e) % W for e in range(d, W)]
            received["ring"] |= owned[owner] & needed[further].any(axis=0)
        if plan.strategy == "hierarchical":
            expected = through_relays(needed, layout.owner, rank, min(per_node, W))
            assert sum(stats.blocks_received) == sum(stats.gradient_blocks_sent) == expected
        else:
            assert sum(stats.blocks_received) == received[plan.strategy].sum()
            assert sum(stats.gradient_blocks_sent) == received["direct"].sum()
        assert stats.batch_groups == groups
        assert stats.remote_blocks == (~owned[rank] & (np.arange(layout.blocks) < real)).sum() * (
            groups
        )
        assert stats.work == tuple(p.rows.visible_blocks for p in plans)
    for what in ("blocks", "gradient_blocks"):
        sent = sum(sum(getattr(p.stats, f"{what}_sent")) for p in plans)
        assert sent == sum(sum(getattr(p.stats, f"{what}_received")) for p in plans)


def through_relays(needed: Array, owner: Array, rank: int, per_node: int) -> int:
    """Blocks that come to a rank: of its node; what it relays, which some rank of its node needs;
    and what it needs of what the others of its node relay."""
    node, place = divmod(rank, per_node)
    here, mine = owner // per_node == node, owner % per_node == place
    mates = needed[node * per_node : (node + 1) * per_node].any(axis=0)
    near = needed[rank] & here & (owner != rank)
    relayed = mates & ~here & mine
    passed = needed[rank] & ~here & ~mine
    return int(near.sum() + relayed.sum() + passed.sum())


def plans_of(
    case: Case, world_size: int, layout: str, strategy: str, machine: rf.Machine | None = None
) -> list[rf.Plan]:
    return rf.plan_all(
        case.mask_mod(),
        case.seq_len,
        world_size,
        B=case.B,
        H=case.Hq,
        layout=layout,
        strategy=strategy,
        block_size=case.block_size,
        machine=machine,
    )


@settings(max_examples=34)  # 500 and more in all
@given(data=st.data())
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", [*LAYOUTS, "balanced", "nested"])
def test_steps_of_all_ranks_fit_together(layout: str, strategy: str, data: st.DataObject) -> None:
    case = Case(
        mask=data.draw(st.sampled_from(list(MASKS))),
        seq_len=data.draw(st.integers(1, 320)),
        block_size=data.draw(st.sampled_from([7, 16, 32])),
    )
    at_once = data.draw(st.sampled_from([0, 100, 1000]))
    nodes = rf.Machine(gpus_per_node=data.draw(st.integers(1, 4)), at_once=at_once)
    plans = plans_of(case, data.draw(st.integers(1, 9)), layout, strategy, nodes)
    play(plans)
    check_needs(case, plans)


@settings(max_examples=34)
@given(data=st.data())
@pytest.mark.parametrize("layout", [*LAYOUTS, "balanced", "nested"])
def test_hierarchical_steps_fit_together(layout: str, data: st.DataObject) -> None:
    case = Case(
        mask=data.draw(st.sampled_from(list(MASKS))),
        seq_len=data.draw(st.integers(1, 600)),
        block_size=data.draw(st.sampled_from([7, 16, 32])),
    )
    per_node, nodes = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    machine = rf.Machine(gpus_per_node=per_node)
    plans = plans_of(case, per_node * nodes, layout, "hierarchical", machine)
    play(plans)
    check_needs(case, plans, per_node)
    between = [(t.peer, p.rank) for p in plans for s in p.steps for t in s.receives]
    for there, here in between:  # from one node to another only between ranks of one place
        same_node = there // per_node == here // per_node
        assert same_node or there % per_node == here % per_node


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(mask: str) -> None:
    case = Case(mask=mask, seq_len=200)
    for turn, layout in enumerate(LAYOUTS):
        plans = plans_of(case, 5, layout, STRATEGIES[(turn + list(MASKS).index(mask)) % 3])
        play(plans)
        check_needs(case, plans)
        dense = dense_mask(case)
        for plan in plans:
            rows = plan.rows.to_dense()[:, :, plan.valid, : case.seq_len]
            expected = dense.index_select(2, plan.positions[plan.valid])
            assert torch.equal(rows.expand_as(expected), expected)


def test_nobody_sends_what_nobody_sees() -> None:
    for strategy in ("ring", "direct"):
        for plan in plans_of(Case(mask="nothing"), 4, "zigzag", strategy):
            assert len(plan.steps) == 1
            assert sum(plan.stats.blocks_received) == 0
            assert plan.stats.skipped == 1


def test_batch_elements_get_only_what_they_need() -> None:
    """Documents differ from row to row of the batch: the second row is one document."""
    ids = torch.stack([torch.arange(128) // 32, torch.zeros(128, dtype=torch.int64)])
    plans = rf.plan_all(
        rf.document(ids), 128, 4, B=2, layout="contiguous", strategy="direct", block_size=16,
        machine=rf.Machine(at_once=0),
    )  # fmt: skip
    for plan in plans:
        # Two blocks a rank: the first row's document is local, the second row needs all the rest.
        assert sum(plan.stats.blocks_received) == 6
        for step in plan.steps[1:]:
            assert [[b.size for b in t.blocks] for t in step.receives] == [[0, 2]]


def test_a_ring_passes_on_what_is_needed_further_along() -> None:
    """Only rank 2 sees rank 0's keys: rank 1 carries them, rank 3 never has them."""
    mask = lambda b, h, q_idx, kv_idx: (q_idx >= 64) & (q_idx < 96) & (kv_idx < 32)
    plans = rf.plan_all(mask, 128, 4, layout="contiguous", strategy="ring", block_size=32)
    assert [p.stats.blocks_received for p in plans] == [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]
    assert [p.stats.blocks_sent for p in plans] == [(0, 1, 0), (0, 0, 1), (0, 0, 0), (0, 0, 0)]
    assert plans[2].stats.gradient_blocks_sent == (0, 0, 1)
    assert plans[0].stats.gradient_blocks_received == (0, 0, 1)
    assert [s.mask is not None for s in plans[2].steps] == [False, False, True]
