"""Tiles of gradients in lines: descriptors, and shared memory as TMA finds it."""

import pytest
import torch

from ringflex.kernels.hopper_gradients import _lines
from ringflex.kernels.hopper_launch import described_in_lines, has_lines

ROWS = 64


def row_of_line(line: int) -> int:
    """Of 64, as a descriptor's dimensions of 8, 4 and 2 count lines."""
    return line // 8 * 8 + line % 2 * 4 + line // 2 % 4


@pytest.mark.parametrize("columns", [64, 128])
def test_shared_memory(columns: int) -> None:
    """A line is of 128 bytes; TMA takes 32 columns after the other, and exchanges 16-byte pieces of
    line i by i % 8."""
    bases = _lines(columns).offset_bases
    assert 1 << len(bases) == ROWS * columns
    for offset in range(ROWS * columns):
        row = column = 0
        for bit, (by_row, by_column) in enumerate(bases):
            if offset >> bit & 1:
                row, column = row ^ by_row, column ^ by_column
        line = offset // 32 % ROWS
        piece = column // 4 % 8 ^ line % 8
        assert row == row_of_line(line)
        assert offset == (column // 32 * ROWS + line) * 32 + piece * 4 + column % 4


def test_a_warp_meets_in_no_bank() -> None:
    """It writes two columns of 8 rows by 4 threads each: half of them at once, to 32 banks."""
    places = {}
    for offset in range(ROWS * 128):
        row = column = 0
        for bit, (by_row, by_column) in enumerate(_lines(128).offset_bases):
            if offset >> bit & 1:
                row, column = row ^ by_row, column ^ by_column
        places[row, column] = offset
    for first in range(0, ROWS, 4):
        for begin in range(0, 128, 8):
            banks = {places[first + i, begin + j] % 32 for i in range(4) for j in range(8)}
            assert len(banks) == 32


@pytest.mark.parametrize(
    ("batch", "heads", "bshd"), [(1, 4, False), (2, 3, False), (1, 4, True), (2, 1, True)]
)
def test_descriptors(batch: int, heads: int, bshd: bool) -> None:
    S, D = 128, 96
    shape = (batch, S, heads, D) if bshd else (batch, heads, S, D)
    x = torch.arange(batch * heads * S * D, dtype=torch.float32).view(shape)
    x = x.transpose(1, 2) if bshd else x
    assert has_lines(x)
    d = described_in_lines(x, 128)
    lines = torch.as_strided(x, d.shape, d.strides)
    rows = [8 * (line // 8) + row_of_line(line % 8) for line in range(S)]
    assert torch.equal(lines.reshape(batch, heads, S, D), x[:, :, rows])


def test_what_has_no_lines() -> None:
    x = torch.zeros(2, 4, 128, 64)
    assert has_lines(x)
    assert not has_lines(x.half())
    assert not has_lines(x[:, :, :100])
    assert not has_lines(torch.zeros(2, 128, 4, 64).transpose(1, 2))
    assert not has_lines(torch.zeros(1, 4, 128, 66)[..., :64])
    assert not has_lines(torch.zeros(1, 4, 64, 128).transpose(2, 3))
