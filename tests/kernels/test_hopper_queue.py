"""The queue of the Hopper kernels: every tile once, and nobody left with a long one in the end."""

import heapq
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ringflex as rf
from ringflex.kernels import hopper_common
from ringflex.kernels.block_lists import key_lists, query_lists
from ringflex.kernels.contract import Way
from ringflex.kernels.hopper_launch import (
    Programs,
    counters,
    in_sections,
    multiprocessors,
    queue,
)

CPU = torch.device("cpu")
LIFE = 1e10


class Pointer:
    def __init__(self, values: np.ndarray, at: int = 0) -> None:
        self.values, self.at = values, at

    def __add__(self, step: int) -> "Pointer":
        return Pointer(self.values, self.at + step)

    def __sub__(self, step: int) -> "Pointer":
        return Pointer(self.values, self.at - step)

    def load(self) -> int:
        return int(self.values[self.at])


@pytest.fixture
def head_and_place(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """The device function, run by Python."""
    device = SimpleNamespace(minimum=min, load=Pointer.load, to_tensor=int)
    monkeypatch.setattr(hopper_common, "gl", device)
    return hopper_common.head_and_place.fn


@pytest.mark.parametrize("together", [1, 3, 4])
@pytest.mark.parametrize("ends", [[9], [1, 9], [5, 6, 9], [1, 2, 3, 8, 9]])
@pytest.mark.parametrize("heads", [1, 4, 10])
def test_every_tile_once(together: int, ends: list[int], heads: int, head_and_place) -> None:  # type: ignore[no-untyped-def]
    sections = Pointer(np.array(ends))
    tiles = [head_and_place(work, together, heads, sections) for work in range(heads * 9)]
    assert sorted(tiles) == [(head, place) for head in range(heads) for place in range(9)]
    for head in range(heads):
        places = [place for h, place in tiles if h == head]
        assert places == sorted(places)
    section = [np.searchsorted(ends, place, side="right") for _, place in tiles]
    assert section == sorted(section)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mask", ["causal", "documents", "window", "full"])
def test_programs_end_together(mask: str, transposed: bool, head_and_place) -> None:  # type: ignore[no-untyped-def]
    """With the work of each tile known, the last program ends within a tenth of the average; and
    what neighbours read, they read one after the other."""
    S, heads, tiles = 16_384, 32, 2
    lengths = [3000, 700, 5000, 100, 2500, 1000, 4000, 84]
    mod = {
        "causal": rf.causal(),
        "documents": rf.causal() & rf.document_from_lengths(lengths),
        "window": rf.causal() & rf.sliding_window(4096),
        "full": rf.full(),
    }[mask]
    block_mask = rf.create_block_mask(mod, None, None, S, S)
    make = key_lists if transposed else lambda mask, groups, device: query_lists(mask, device)
    before = make(block_mask, 1, CPU)
    lists, sections = in_sections(
        before, tiles, heads, CPU, Programs(7, 5, 6, 3), backwards=not transposed
    )
    numbers = sections.as_strided((4,), (1,), sections.storage_offset() - 4)
    assert numbers.tolist() == [5, 6, 3, 0] and sections.data_ptr() % 16 == 0
    assert sections[-1] == lists.blocks * tiles and (sections.diff() > 0).all()
    order = lists.order[0].long()
    assert order.sort().values.equal(torch.arange(lists.blocks))
    work = torch.from_numpy(before.visited[0])[order]
    busy, apart = [0.0] * multiprocessors(CPU), []
    pointer, last = Pointer(sections.numpy()), 0
    for number in range(heads * lists.blocks * tiles):
        _, place = head_and_place(number, 4, heads, pointer)
        at = int(order[place // tiles])
        apart.append(abs(at - last))
        last = at
        heapq.heappush(busy, heapq.heappop(busy) + int(work[place // tiles]) + 1)
    assert max(busy) < 1.1 * np.mean(busy)
    assert np.mean(np.array(apart) <= 1) > 0.9


@pytest.mark.parametrize("tiles", [1, 131, 132, 133, 4096, 70001])
@pytest.mark.parametrize("lives", [0, 0.001, 0.04, 0.3, 1, 7])
@pytest.mark.parametrize("beside", [False, True])
def test_programs_come_to_all_tiles(tiles: int, lives: float, beside: bool) -> None:
    """`lives`: what a tile takes of what a program may."""
    at_once = multiprocessors(CPU)
    programs, quota, spread, waves = queue(tiles, lives * tiles * LIFE, CPU, beside, LIFE)
    quotas = quota + np.arange(programs) % spread
    assert quotas.sum() >= tiles and waves == 1
    mean = max(1, round(1 / max(lives, 1e-9)))
    if not beside or tiles <= 2 * mean * at_once:
        assert programs == min(tiles, at_once)
    elif mean == 1:
        assert programs == tiles and quotas.max() == 1
    else:
        # None must take more than its share after the others; they end one after the other.
        assert tiles + at_once * mean <= quotas.sum() <= tiles + 1.5 * at_once * (mean + 1) + spread
        assert quotas.max() <= 2 * mean + 1 and len(set(quotas[:at_once])) >= min(spread, at_once)


@pytest.mark.parametrize("told", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("tiles", [1, 131, 528, 3_000])
def test_programs_make_way(tiles: int, told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as run at once, each time that they are told, but never the last of them."""
    at_once = multiprocessors(CPU)
    programs = queue(tiles, 1.0, CPU, True, LIFE, Way(times=3))
    assert programs == (4 * at_once, 1 << 30, 1, 4)
    device = SimpleNamespace(
        minimum=min, load=lambda p, volatile=False: p.load(), num_programs=lambda _: programs.number
    )
    monkeypatch.setattr(hopper_common, "gl", device)
    counters, sections = Pointer(np.array([0, 0, told])), Pointer(np.array([*programs[1:], 0]), 4)
    leave = []
    for program in range(programs.number):
        device.program_id = lambda _, program=program: program
        leave.append(hopper_common.makes_way.fn(counters, sections))
        assert hopper_common.quota.fn(sections) >= tiles
    assert leave == [i < min(told, 3) * at_once for i in range(programs.number)]


def test_a_way_is_a_word_of_the_counters() -> None:
    way = Way(times=2)
    slot = counters(CPU, way)
    assert way.word is not None and way.word.data_ptr() == slot[2:].data_ptr()
    assert slot.tolist() == [0] * 4 and way.word.numel() == 1


def test_others_never_make_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a number is left from a launch before."""
    programs = queue(50_000, 50_000 * LIFE / 9, CPU, True, LIFE)
    assert programs.waves == 1 and programs.spread > 1
    device = SimpleNamespace(
        minimum=min, load=lambda p, volatile=False: p.load(),
        num_programs=lambda _: programs.number, program_id=lambda _: 0,
    )  # fmt: skip
    monkeypatch.setattr(hopper_common, "gl", device)
    sections = Pointer(np.array([*programs[1:], 0]), 4)
    assert not hopper_common.makes_way.fn(Pointer(np.array([0, 0, 5])), sections)
