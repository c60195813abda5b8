"""Runs in CSR arrays against the dense boolean matrix that they stand for."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from masks.csr import assert_canonical, dense
from ringflex.masks.runs import Array, Runs, counting


def pieces(matrix: Array, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """The true elements as disjoint pieces, cut at random, shuffled, with empty ones between."""
    found = []
    for row, line in enumerate(matrix):
        x = 0
        while x < line.size:
            end = x + int(rng.integers(1, 4))
            if line[x : end + 1].all():
                found.append((row, x, min(end, line.size)))
                x = end
            else:
                if line[x]:
                    found.append((row, x, x + 1))
                found.append((row, x, x))
                x += 1
    order = rng.permutation(len(found))
    row, start, end = np.array(found, dtype=np.int64).reshape(-1, 3)[order].T
    return row, start, end


matrices = st.builds(
    lambda rows, columns, density, seed: (
        np.random.default_rng(seed).random((rows, columns)) < density
    ),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.integers(0, 10**6),
)


@settings(max_examples=100)
@given(matrices, st.integers(0, 99))
def test_from_pieces(matrix: Array, seed: int) -> None:
    runs = Runs.from_pieces(*pieces(matrix, np.random.default_rng(seed)), matrix.shape[0])
    assert_canonical(runs, matrix.shape[1])
    assert (dense(runs, matrix.shape[1]) == matrix).all()
    assert runs.rows == matrix.shape[0] and runs.blocks == matrix.sum()
    for row in range(runs.rows):  # `row` and `indptr` tell the same
        assert (runs.row[runs.indptr[row] : runs.indptr[row + 1]] == row).all()
    row, column = runs.pairs()
    assert (np.argwhere(matrix) == np.stack([row, column], axis=1)).all()


@settings(max_examples=150)
@given(matrices, st.sampled_from([1, 2, 3]), st.integers(0, 99))
def test_transpose(matrix: Array, groups: int, seed: int) -> None:
    """Group by group: neither end of a group runs on into the next."""
    rng = np.random.default_rng(seed)
    height, columns = matrix.shape
    stack = np.stack([np.roll(matrix, g, axis=0) for g in range(groups)])
    runs = Runs.from_pieces(*pieces(stack.reshape(-1, columns), rng), groups * height)
    turned = runs.transpose(height, columns)
    assert_canonical(turned, height)
    assert turned.rows == groups * columns
    assert (dense(turned, height).reshape(groups, columns, height) == stack.mT).all()
    back = turned.transpose(columns, height)
    assert (dense(back, columns) == stack.reshape(-1, columns)).all()


def test_transpose_stays_small() -> None:
    """A causal mask's half a billion blocks are never listed one by one."""
    rows = 32768
    row = np.arange(rows)
    turned = Runs.from_pieces(row, np.zeros_like(row), row + 1, rows).transpose(rows, rows)
    assert (turned.start == row).all() and (turned.end == rows).all()


def test_counting() -> None:
    assert counting(np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]
    assert counting(np.array([], dtype=np.int64)).tolist() == []
