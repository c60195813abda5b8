"""Rows in pieces: every block once, and worth it."""

import heapq
from typing import Any

import pytest
import torch

import ringflex as rf
from list_walks import visits
from ringflex.kernels.block_lists import BlockLists, key_lists
from ringflex.kernels.hopper_launch import Programs, in_sections, multiprocessors
from ringflex.kernels.pieces import Tail, keys_in_pieces, tail_of

CPU = torch.device("cpu")
S, BLOCK = 320, 16
HIDDEN = torch.tensor([5, 200])
MASKS = {  # of rows of like work, with partial blocks and without
    "full": lambda b, h, q, k: q >= 0,
    "per batch": lambda b, h, q, k: k != HIDDEN[b],
    "ragged": lambda b, h, q, k: (k // 48 != b) & (k % 50 > h),
}


def of_keys(mask: rf.BlockMask) -> BlockLists:
    return key_lists(mask, 1, CPU, descending=True)


def seen(lists: BlockLists, row: int) -> list[int]:
    return visits(lists, row, 0) + visits(lists, row, 1)


@pytest.mark.parametrize("tail", [Tail(1, 8), Tail(3, 4), Tail(20, 5)])
@pytest.mark.parametrize("name", MASKS)
def test_pieces_make_the_row(name: str, tail: Tail) -> None:
    batch, heads = (None, None) if name == "full" else (2, 2)
    mask = rf.create_block_mask(MASKS[name], batch, heads, S, S, BLOCK_SIZE=BLOCK)
    whole = of_keys(mask)
    lists = keys_in_pieces(mask, whole, tail, CPU)
    count = whole.blocks
    assert lists.blocks == (1 + tail.pieces) * count
    for group, order in enumerate(whole.order_here):
        for place, r in enumerate(order):
            at = [(group * (1 + tail.pieces) + i) * count + int(r) for i in range(1 + tail.pieces)]
            pieces = [seen(lists, row) for row in at]
            blocks = seen(whole, group * count + int(r))
            assert sorted(b for piece in pieces for b in piece) == sorted(blocks)
            if place < whole.places - tail.rows:
                assert pieces[0] == blocks
                continue
            sizes = [len(piece) for piece in pieces[1:]]
            assert not pieces[0] and sizes == sorted(sizes, reverse=True)
            assert sizes[0] <= sizes[-1] + 1


def test_every_piece_has_its_place() -> None:
    mask = rf.create_block_mask(rf.full(), None, None, S, S, BLOCK_SIZE=BLOCK)
    lists = keys_in_pieces(mask, of_keys(mask), Tail(3, 4), CPU)
    lists, _ = in_sections(lists, 1, 4, CPU, Programs(1), backwards=False)
    assert lists.places == S // BLOCK - 3 + 3 * 4
    rows = lists.order_here[0, : lists.places]
    assert all(seen(lists, int(row)) for row in rows) and len(set(rows)) == lists.places


@pytest.mark.parametrize(
    ("mask", "tokens", "per_row", "tail"),
    [
        (rf.full(), 16_384, 32, Tail(1, 6)),  # 31 rounds and 4 tiles
        (rf.full(), 2_048, 66, None),  # 8 rounds
        (rf.full(), 16_384, 33, None),  # 32 rounds
        (rf.full(), 512, 32, None),  # less than a round
        (rf.causal(), 16_384, 32, None),  # short rows come last
    ],
)
def test_what_is_parted(mask: Any, tokens: int, per_row: int, tail: Tail | None) -> None:
    lists = of_keys(rf.create_block_mask(mask, None, None, tokens, tokens))
    assert tail_of(lists, per_row, CPU) == tail


@pytest.mark.parametrize(
    ("tokens", "per_row"), [(8_192, 32), (16_384, 8), (16_384, 32), (65_536, 8), (65_536, 32)]
)
def test_it_takes_less_time(tokens: int, per_row: int) -> None:
    """By the work of each tile, and 1% of the longest to begin and to end one."""
    mask = rf.create_block_mask(rf.full(), None, None, tokens, tokens)
    whole = of_keys(mask)
    tail = tail_of(whole, per_row, CPU)
    assert tail is not None
    parted = keys_in_pieces(mask, whole, tail, CPU)

    def rounds(lists: BlockLists) -> float:
        busy = [0.0] * multiprocessors(CPU)
        for work in lists.work:
            for _ in range(per_row):
                heapq.heappush(busy, heapq.heappop(busy) + work / whole.blocks + 0.01)
        return max(busy)

    ideal = whole.places * per_row / multiprocessors(CPU)
    assert rounds(parted) - ideal < 0.75 * (rounds(whole) - ideal)
