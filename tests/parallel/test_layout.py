"""Layouts: every block on one rank, equal shares, ascending; and their definitions."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ringflex as rf
from attention_cases import LAYOUTS

ZIGZAG_OF_3 = [0, 1, 2, 2, 1, 0]


@given(
    name=st.sampled_from(LAYOUTS),
    seq_len=st.integers(1, 3000),
    world_size=st.integers(1, 40),
    block_size=st.sampled_from([1, 3, 16, 128]),
)
def test_every_block_is_on_one_rank(
    name: str, seq_len: int, world_size: int, block_size: int
) -> None:
    layout = rf.make_layout(name, seq_len, world_size, block_size)
    shares = [layout.blocks_of(rank) for rank in range(world_size)]
    assert all((np.diff(share) > 0).all() for share in shares)  # ascending
    assert sorted(np.concatenate(shares)) == list(range(layout.blocks))
    assert {share.size for share in shares} == {layout.blocks // world_size}
    assert layout.local_len == layout.blocks // world_size * block_size

    positions = [layout.positions_of(rank) for rank in range(world_size)]
    assert {p.size for p in positions} == {layout.local_len}
    assert sorted(np.concatenate(positions)) == list(range(layout.blocks * block_size))
    for share, position in zip(shares, positions):
        assert (position // block_size == np.repeat(share, block_size)).all()

    # Padding is less than one chunk a rank: no layout rounds up further than it must.
    chunks = 2 * world_size if name == "zigzag" else world_size
    assert layout.real_blocks == -(-seq_len // block_size)
    assert layout.blocks == -(-layout.real_blocks // chunks) * chunks


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("contiguous", np.repeat([0, 1, 2], 4)),
        ("zigzag", np.repeat(ZIGZAG_OF_3, 2)),
        ("striped", np.tile([0, 1, 2], 4)),
    ],
)
def test_owners(name: str, owner: np.ndarray) -> None:
    assert (rf.make_layout(name, 12 * 16 - 5, 3, 16).owner == owner).all()


def test_one_token_on_many_ranks() -> None:
    for name in LAYOUTS:
        layout = rf.make_layout(name, 1, 8, 16)
        assert [int((layout.positions_of(rank) < 1).sum()) for rank in range(8)] == [1] + [0] * 7


def test_layouts_are_frozen() -> None:
    layout = rf.make_layout("zigzag", 100, 2, 16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.seq_len = 3  # type: ignore[misc]


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="layout='spiral' is not one of contiguous, zigzag"):
        rf.make_layout("spiral", 100, 2, 16)


def test_a_balanced_layout_needs_masks() -> None:
    with pytest.raises(ValueError, match=r"'balanced' depends on the masks: take it from plan\("):
        rf.make_layout("balanced", 100, 2, 16)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None])
@pytest.mark.parametrize("size", ["seq_len", "world_size", "block_size"])
def test_sizes_are_positive_integers(size: str, value: object) -> None:
    sizes = {"seq_len": 100, "world_size": 2, "block_size": 16, size: value}
    with pytest.raises(ValueError, match=f"{size} must be a positive int, got {value!r}"):
        rf.make_layout("contiguous", **sizes)  # type: ignore[arg-type]
