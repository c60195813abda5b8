"""The lists that kernels walk, against the block map."""

import pytest
import torch

import ringflex as rf
from list_walks import visits
from ringflex.kernels.block_lists import key_lists, positions, query_lists

S, BLOCK = 300, 16
REACH = torch.tensor([3, 40, 300, 7])
IDS = torch.sort(torch.randint(0, 9, (2, S), generator=torch.Generator().manual_seed(1)))[0]
MASKS = {
    "causal": rf.causal(),
    "documents": rf.causal() & rf.document(IDS),
    "per head": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() < REACH[h],
    "nothing": rf.causal() & ~rf.causal(),
}
CPU = torch.device("cpu")


def block_mask(name: str) -> rf.BlockMask:
    return rf.create_block_mask(MASKS[name], 2, 4, S, S, BLOCK_SIZE=BLOCK)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_every_visible_block_once(name: str, transposed: bool) -> None:
    mask = block_mask(name)
    lists = key_lists(mask, 2, CPU) if transposed else query_lists(mask, CPU)
    states = torch.from_numpy(mask.block_map()).flatten(0, 1)
    states = states.mT if transposed else states
    assert lists.blocks == states.shape[1]
    for row, expected in enumerate(states.flatten(0, 1)):
        for kind, state in ((0, 1), (1, 2)):
            assert visits(lists, row, kind) == (expected == state).nonzero().flatten().tolist()
    assert lists.any_partial is bool((states == 1).any())


@pytest.mark.parametrize("name", MASKS)
def test_descending_lists_count_from_the_end(name: str) -> None:
    mask = block_mask(name)
    lists, backwards = (key_lists(mask, 2, CPU, descending=d) for d in (False, True))
    assert torch.equal(lists.order, backwards.order)
    for row in range(lists.rows.shape[0]):
        for kind in (0, 1):
            seen = [mask.q_blocks - 1 - block for block in visits(backwards, row, kind)]
            assert seen == visits(lists, row, kind)[::-1]


@pytest.mark.parametrize("stretches", [2, 3, 19, 40])
@pytest.mark.parametrize("name", MASKS)
def test_stretches_part_the_queries(name: str, stretches: int) -> None:
    mask = block_mask(name)
    whole = key_lists(mask, 1, CPU, descending=True)
    parted = key_lists(mask, 1, CPU, descending=True, stretches=stretches)
    assert parted.blocks == stretches * whole.blocks
    length = -(-mask.q_blocks // stretches)
    visited = torch.zeros(parted.rows.shape[0], dtype=torch.int64)
    for row in range(whole.rows.shape[0]):
        group, block = divmod(row, whole.blocks)
        rows = [group * parted.blocks + s * whole.blocks + block for s in range(stretches)]
        for kind in (0, 1):
            lists = [visits(parted, r, kind) for r in rows]
            assert [b for blocks in lists for b in blocks] == visits(whole, row, kind)
            assert all(b // length == s for s, blocks in enumerate(lists) for b in blocks)
            visited[rows] += torch.tensor([len(blocks) for blocks in lists])
    listed = visited.view(-1, parted.blocks).gather(1, parted.order.long())
    assert not listed[:, parted.places :].any()
    assert parted.places == len(parted.work) == listed.any(0).sum()


@pytest.mark.parametrize("name", MASKS)
def test_longest_rows_first(name: str) -> None:
    mask = block_mask(name)
    lists = query_lists(mask, CPU)
    work = lists.rows[:, 1] + lists.rows[:, 3]
    for group, order in zip(work.view(-1, lists.blocks), lists.order, strict=True):
        assert order.sort()[0].tolist() == list(range(lists.blocks))
        assert (group[order.long()].diff() <= 0).all()
    assert lists.work.sum() == pytest.approx(work.sum().item() / lists.order.shape[0])


def test_heads_of_a_group_share_an_order() -> None:
    """A tile of keys serves all query heads of its group: what counts is their work together."""
    mask = block_mask("per head")
    lists = key_lists(mask, 2, CPU)
    assert lists.order.shape == (2, lists.blocks)
    work = (lists.rows[:, 1] + lists.rows[:, 3]).view(2, 2, lists.blocks).sum(1)
    for group, order in zip(work, lists.order, strict=True):
        assert (group[order.long()].diff() <= 0).all()


def test_positions() -> None:
    mask = block_mask("causal")
    place = positions(mask, CPU)
    assert place.kv_in_order and place.q.tolist() == list(range(0, 304, BLOCK))
    chosen = mask.select_kv([torch.tensor([1, 5, 6]).numpy()])
    moved = positions(chosen, CPU)
    assert not moved.kv_in_order and moved.kv.tolist() == [[16, 80, 96]]
    assert (moved.q.dtype, moved.kv.dtype) == (torch.int32, torch.int32)


@pytest.mark.parametrize(
    ("mask", "together"),
    [(rf.causal(), True), (rf.full(), True), (rf.causal() & rf.sliding_window(64), False)],
    ids=str,
)
def test_rows_that_begin_together(mask: rf.MaskMod, together: bool) -> None:
    """Keys under a causal mask are all seen by the last queries; those of a window are not."""
    block_mask = rf.create_block_mask(mask, None, None, 512, 512, BLOCK_SIZE=16)
    assert key_lists(block_mask, 1, CPU, descending=True).begin_together == together
    assert query_lists(block_mask, CPU).begin_together == together
