"""Tiles of queries that the Hopper forward computes once more.

Weights are taken relative to a maximum that is not found anew in every tile of keys (see
`hopper_softmax`). Should that leave the range of the dtype, a group of consumers does not write
what it has, but reports the tile; the producer issues it again, with a running maximum, for that
group alone: the other may have merged its rows into running results, and must not do so twice. So
results depend on the inputs only, not on which program met them.

The producer is at most three tiles ahead, and remembers the last ones it issued (`issued`, ISSUED
records of number and of how). Once it sees a report, and at the end, it waits until the groups have
done all that was issued, by an empty tile (FLUSH), and issues again what was reported.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflex.kernels.hopper_common import FOUR_WARPS, ONE_WARP, read_word, write_word

ISSUED = gl.constexpr(4)
FAILURES = gl.constexpr(8)  # of a group, which reports 4 at most; behind them, EMPTY
EMPTY = gl.constexpr(0x7FFFFFFF)
# How a tile is computed. The lowest bits: which of two groups write.
ALL = gl.constexpr(3)
RUNNING = gl.constexpr(4)  # with a running maximum throughout
FLUSH = gl.constexpr(8)  # there is none; when it is taken, all before are done


@gluon.jit
def remember(issued, given, work, how):
    """The producer issues tile `work` as its number `given`."""
    slot = given % ISSUED
    write_word(issued, 2 * slot, work)
    write_word(issued, 2 * slot + 1, how)


@gluon.jit
def how_computed(issued, number):
    """How the tile that was issued under a number is to be computed; for consumers."""
    return read_word(issued, number % ISSUED * 2 + 1)


@gluon.jit
def report(failed, issued, number, failures, GROUP: gl.constexpr):
    """A group's tile, by the number that it was issued under, is to be computed once more."""
    work = read_word(issued, number % ISSUED * 2)
    write_word(failed, GROUP * FAILURES + failures, work, FOUR_WARPS)


@gluon.jit
def forget(failed, GROUPS: gl.constexpr):
    """No group has reported any; for the producer."""
    for i in gl.static_range(GROUPS * FAILURES):
        write_word(failed, i, EMPTY)


@gluon.jit
def first_reported(failed, GROUPS: gl.constexpr):
    """EMPTY if no group has reported any; for the producer."""
    found = gl.to_tensor(EMPTY)
    for group in gl.static_range(GROUPS):
        found = gl.minimum(found, _reported(failed, group * FAILURES))
    return found


@gluon.jit
def next_reported(failed, entry, GROUPS: gl.constexpr):
    """The tile of the first entry from `entry` on, which may be EMPTY, and that entry."""
    work = _reported(failed, entry)
    for _ in gl.static_range(GROUPS - 1):
        if work == EMPTY and entry < (GROUPS - 1) * FAILURES:
            entry = (entry // FAILURES + 1) * FAILURES
            work = _reported(failed, entry)
    return work, entry


@gluon.jit
def _reported(failed, entry):
    """One number from shared memory, by a partition of one warp."""
    return gl.max(failed.index(entry).load(ONE_WARP), axis=0)
