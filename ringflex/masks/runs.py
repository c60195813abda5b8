"""Lists of runs of blocks, in CSR arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def counting(width: Array) -> Array:
    """`0 .. width[i] - 1` for each i, end to end: `counting([2, 3])` is `[0, 1, 0, 1, 2]`."""
    return np.arange(width.sum()) - np.repeat(np.cumsum(width) - width, width)


@dataclass(frozen=True, eq=False)
class Runs:
    """Row `r` has the runs `indptr[r]:indptr[r + 1]`, sorted and disjoint.

    Attributes:
        indptr: int64 `[rows + 1]`.
        start, end: int64 `[runs]`, in blocks; `end` is exclusive.
    """

    indptr: Array
    start: Array
    end: Array

    @classmethod
    def from_pieces(cls, row: Array, start: Array, end: Array, rows: int) -> Runs:
        """Sorts disjoint pieces by row, drops empty ones and joins those that touch."""
        keep = end > start
        row, start, end = row[keep], start[keep], end[keep]
        order = np.lexsort((start, row))
        row, start, end = row[order], start[order], end[order]
        first = np.ones(row.size, dtype=bool)
        first[1:] = (row[1:] != row[:-1]) | (start[1:] != end[:-1])
        last = np.ones(row.size, dtype=bool)
        last[:-1] = first[1:]
        indptr = np.zeros(rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(row[first], minlength=rows), out=indptr[1:])
        return cls(indptr, start[first], end[last])

    @property
    def rows(self) -> int:
        return self.indptr.size - 1

    @property
    def row(self) -> Array:
        """int64 `[runs]`: the row of each run."""
        return np.repeat(np.arange(self.rows), np.diff(self.indptr))

    @property
    def blocks(self) -> int:
        """Number of blocks in all runs."""
        return int((self.end - self.start).sum())

    def pairs(self) -> tuple[Array, Array]:
        """Every (row, column) of every run, in order: int64 `[blocks]` each."""
        width = self.end - self.start
        return np.repeat(self.row, width), np.repeat(self.start, width) + counting(width)

    def transpose(self, rows_per_group: int, columns: int) -> Runs:
        """The same blocks by column: runs of rows. Groups (batch, head) stay apart.

        Row `group * rows_per_group + r` that lists column `c` becomes row `group * columns + c`
        that lists `r`. A column's run begins at a row that has it where the row before has not,
        and ends where that turns round; only these events are expanded, never all blocks.
        """
        group, r = np.divmod(self.row, rows_per_group)
        here = group * (rows_per_group + 1) + r  # one empty row after each group ends its runs
        up = np.ones(here.size, dtype=np.int64)
        at_row = np.concatenate([here, here, here + 1, here + 1])
        column = np.concatenate([self.start, self.end, self.start, self.end])
        change = np.concatenate([up, -up, -up, up])
        order = np.lexsort((column, at_row))
        at_row, column = at_row[order], column[order]
        # Between two neighbouring entries of a row: this row's membership minus the last row's.
        difference = np.cumsum(change[order])[:-1]
        segment = np.flatnonzero((difference != 0) & (column[:-1] < column[1:]))
        width = column[segment + 1] - column[segment]
        event_column = np.repeat(column[segment], width) + counting(width)
        group, event_row = np.divmod(np.repeat(at_row[segment], width), rows_per_group + 1)
        key = group * columns + event_column
        begins = np.repeat(difference[segment] > 0, width)
        starts = np.lexsort((event_row[begins], key[begins]))
        ends = np.lexsort((event_row[~begins], key[~begins]))
        return Runs.from_pieces(
            key[begins][starts],
            event_row[begins][starts],
            event_row[~begins][ends],
            self.rows // rows_per_group * columns,
        )


def union(row: Array, start: Array, end: Array, rows: int) -> Runs:
    """The blocks that pieces cover, which may overlap; every piece has a block."""
    order = np.lexsort((start, row))
    row, start, end = row[order], start[order], end[order]
    # Rows one after the other on one axis: what was covered up to a piece ends where it begins, or
    # before, if a run begins with it.
    shift = row * (int(end.max(initial=0)) + 1)
    covered = np.maximum.accumulate(end + shift)
    first = np.ones(row.size, dtype=bool)
    first[1:] = (start + shift)[1:] > covered[:-1]
    first[1:] |= row[1:] != row[:-1]
    last = np.ones(row.size, dtype=bool)
    last[:-1] = first[1:]
    indptr = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row[first], minlength=rows), out=indptr[1:])
    return Runs(indptr, start[first], (covered - shift)[last])
