"""Rows in pieces: every block once, in an order in which nobody waits in vain, and worth it."""

import heapq
from typing import Any

import numpy as np
import pytest
import torch

import ringflex as rf
from list_walks import visits
from ringflex.kernels.block_lists import BlockLists, key_lists, query_lists
from ringflex.kernels.hopper_launch import in_sections, multiprocessors
from ringflex.kernels.pieces import Tail, keys_in_pieces, queries_in_pieces, tail_of
from ringflex.kernels.stages import ACTIVE, BEGINS, ENDS, PIECE, SLOT

CPU = torch.device("cpu")
S, BLOCK = 320, 16
HIDDEN = torch.tensor([5, 200])
MASKS = {  # of rows of like work, with partial blocks and without
    "full": lambda b, h, q, k: q >= 0,
    "per batch": lambda b, h, q, k: k != HIDDEN[b],
    "ragged": lambda b, h, q, k: (k // 48 != b) & (k % 50 > h),
}


def block_mask(name: str) -> rf.BlockMask:
    batch, heads = (None, None) if name == "full" else (2, 2)
    return rf.create_block_mask(MASKS[name], batch, heads, S, S, BLOCK_SIZE=BLOCK)


def seen(lists: BlockLists, row: int) -> list[int]:
    return visits(lists, row, 0) + visits(lists, row, 1)


@pytest.mark.parametrize("tail", [Tail(1, 8), Tail(3, 2), Tail(20, 5)])
@pytest.mark.parametrize("name", MASKS)
def test_pieces_make_the_row(name: str, tail: Tail) -> None:
    mask = block_mask(name)
    whole = query_lists(mask, CPU)
    lists, turns = queries_in_pieces(mask, whole, None, tail, CPU)
    count = whole.blocks
    assert lists.blocks == (1 + tail.pieces) * count
    for row in range(whole.rows.shape[0]):
        group, r = divmod(row, count)
        at = [(group * (1 + tail.pieces) + i) * count + r for i in range(1 + tail.pieces)]
        if r >= tail.rows:
            assert seen(lists, at[0]) == seen(whole, row) and turns[at[0]] == ACTIVE | BEGINS | ENDS
            assert not any(seen(lists, i) or turns[i] for i in at[1:])
            continue
        pieces = [seen(lists, i) for i in at[1:]]
        assert sorted(b for piece in pieces for b in piece) == sorted(seen(whole, row))
        sizes = [len(piece) for piece in pieces]
        assert sizes == sorted(sizes, reverse=True) and 0 < sizes[0] <= sizes[-1] + 1
        assert not seen(lists, at[0]) and turns[at[0]] == 0
        for i, turn in enumerate(turns[at[1:]]):
            assert turn >> SLOT == r and (turn >> PIECE) % 256 == i + 1 and turn & ACTIVE
            assert (turn & BEGINS != 0) == (i == 0)
            assert (turn & ENDS != 0) == (i == tail.pieces - 1)


@pytest.mark.parametrize("name", MASKS)
def test_pieces_wait_for_what_is_begun(name: str) -> None:
    """In the queue, the pieces of a row come in the order of their numbers."""
    mask = block_mask(name)
    whole = query_lists(mask, CPU)
    for tail in (Tail(2, 8), Tail(7, 3)):
        lists, turns = queries_in_pieces(mask, whole, None, tail, CPU)
        lists, _ = in_sections(lists, 1, 4, CPU, backwards=False)
        turns = turns.reshape(-1, lists.blocks)
        for group, order in enumerate(lists.order_here):
            queue = order[: lists.places]
            assert (turns[group, queue] != 0).all()
            assert np.count_nonzero(turns[group]) == lists.places
            for slot in range(tail.rows):
                of_row = [t for t in turns[group, queue] if t >> PIECE and t >> SLOT == slot]
                numbers = [(t >> PIECE) % 256 for t in of_row]
                assert numbers == list(range(1, 1 + tail.pieces))


@pytest.mark.parametrize("strategy", ["ring", "direct"])
def test_pieces_of_a_step(strategy: str) -> None:
    """Only the first begins, and only the last ends, if the row does with that step."""
    for plan in rf.plan_all(rf.full(), 512, 2, strategy=strategy, block_size=16):
        for step in plan.steps:
            assert step.mask is not None and step.stage is not None
            whole = query_lists(step.mask, CPU, step.stage)
            lists, turns = queries_in_pieces(step.mask, whole, step.stage.turns, Tail(2, 2), CPU)
            before = step.stage.turns.reshape(-1)
            turns = turns.reshape(3, -1)
            parted = whole.order_here[0, whole.places - 2 : whole.places]
            for row, turn in enumerate(before):
                if row not in parted:
                    assert turns[:, row].tolist() == [turn, 0, 0]
                    continue
                first, last = turns[1:, row]
                assert turns[0, row] == 0
                assert first % 8 == turn & ~ENDS and last % 8 == turn & ~BEGINS
            assert lists.places == whole.places + 2


@pytest.mark.parametrize("name", MASKS)
def test_keys_in_pieces(name: str) -> None:
    mask = block_mask(name)
    whole = key_lists(mask, 1, CPU, descending=True)
    lists = keys_in_pieces(mask, whole, Tail(3, 4), CPU)
    for group, order in enumerate(whole.order_here):
        for place, r in enumerate(order):
            rows = [(group * 5 + i) * whole.blocks + r for i in range(5)]
            found = [seen(lists, row) for row in rows]
            row = group * whole.blocks + int(r)
            assert sorted(b for blocks in found for b in blocks) == sorted(seen(whole, row))
            pieces = 4 if place >= whole.places - 3 else 1
            assert sum(map(bool, found)) == min(pieces, len(seen(whole, row)))


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
    lists = query_lists(rf.create_block_mask(mask, None, None, tokens, tokens), CPU)
    assert tail_of(lists, per_row, CPU) == tail


@pytest.mark.parametrize(
    ("tokens", "per_row"), [(8_192, 32), (16_384, 8), (16_384, 32), (65_536, 8), (65_536, 32)]
)
def test_it_takes_less_time(tokens: int, per_row: int) -> None:
    """By the work of each tile, and 1% of the longest to begin and to end one."""
    mask = rf.create_block_mask(rf.full(), None, None, tokens, tokens)
    whole = query_lists(mask, CPU)
    tail = tail_of(whole, per_row, CPU)
    assert tail is not None
    parted, _ = queries_in_pieces(mask, whole, None, tail, CPU)

    def rounds(lists: BlockLists) -> float:
        busy = [0.0] * multiprocessors(CPU)
        for work in lists.work:
            for _ in range(per_row):
                heapq.heappush(busy, heapq.heappop(busy) + work / whole.blocks + 0.01)
        return max(busy)

    ideal = whole.places * per_row / multiprocessors(CPU)
    assert rounds(parted) - ideal < 0.75 * (rounds(whole) - ideal)
