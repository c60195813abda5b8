"""What `Runs` mean, for tests: the dense matrix, and the form that every list of runs has."""

from __future__ import annotations

import numpy as np

from ringflex.masks.runs import Array, Runs


def dense(runs: Runs, columns: int) -> Array:
    """bool `[rows, columns]`."""
    matrix = np.zeros((runs.rows, columns), dtype=bool)
    for row, start, end in zip(runs.row, runs.start, runs.end):
        matrix[row, start:end] = True
    return matrix


def assert_canonical(runs: Runs, columns: int) -> None:
    """Sorted, not empty, neither overlapping nor touching, and inside the matrix."""
    assert runs.indptr[0] == 0 and runs.indptr[-1] == runs.start.size == runs.end.size
    assert (np.diff(runs.indptr) >= 0).all()
    assert (runs.start < runs.end).all()
    assert (runs.start >= 0).all() and (runs.end <= columns).all()
    same_row = runs.row[1:] == runs.row[:-1]
    assert (runs.start[1:] > runs.end[:-1])[same_row].all()
    assert {a.dtype for a in (runs.indptr, runs.start, runs.end)} == {np.dtype(np.int64)}
