"""What the Hopper kernels share: the queue of tiles, and records in shared memory.

A program's producer warp takes tiles of work from a counter in global memory, neighbours one after
the other, short ones last (`hopper_launch.in_sections`), and hands them to the consumer warps with
whatever they need to know, while these are still busy with the tile before. A program fills a
multiprocessor: one for each takes tiles until none is left; or there are more, of a quota of tiles
each, or until they are told to make way, and between them the multiprocessor is free for others.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ringflex.kernels.hopper_intrinsics import uniform

ONE_WARP = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))  # of partitions
FOUR_WARPS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
WORDS = gl.constexpr(8)  # of a record
FIRST_BARRIER = gl.constexpr(5)  # of the named ones; Triton has those below
HANDOVER = gl.constexpr("288")  # threads: two warpgroups that leave a buffer, one warp to fill it


@gluon.jit
def write_word(words, index, value, BY: gl.constexpr = ONE_WARP):
    """One number into shared memory, by a partition of so many warps."""
    words.index(index).store(gl.full([1], 0, gl.int32, BY) + value)


@gluon.jit
def read_word(words, index):
    """That number, by a partition of four warps; taken from one lane, it is known to be uniform."""
    return uniform(gl.max(words.index(index).load(FOUR_WARPS), axis=0))


@gluon.jit
def end(queue, given):
    """Tells the consumers, when they have taken what was `given`, that there is no more, and leaves
    the queue: counters, records, and the barriers of full and of empty ones."""
    counters, words, words_full, words_empty = queue
    slot = given % 2
    mbarrier.wait(words_empty.index(slot), (given // 2 & 1) ^ 1)
    write_word(words, slot * WORDS, -1)
    mbarrier.arrive(words_full.index(slot), count=1)
    leave(counters)


@gluon.jit
def take(counters):
    """The next tile's number."""
    return gl.atomic_add(counters, 1, sem="relaxed")


@gluon.jit
def quota(sections):
    """How many tiles a program may take; see `hopper_launch.Programs`."""
    return gl.load(sections - 4) + gl.program_id(0) % gl.load(sections - 3)


@gluon.jit
def makes_way(counters, sections):
    """Whether a program is to end, for launches that wait: each time that they are told, those of
    one wave more, but never of the last (`contract.Way`)."""
    told, waves = gl.load(counters + 2, volatile=True), gl.load(sections - 2)
    return gl.program_id(0) * waves < gl.minimum(told, waves - 1) * gl.num_programs(0)


@gluon.jit
def leave(counters):
    """The last program to leave sets the counters back to zero, for the next launch."""
    if gl.atomic_add(counters + 1, 1, sem="relaxed") == gl.num_programs(0) - 1:
        for i in gl.static_range(3):
            gl.store(counters + i, 0)


@gluon.jit
def head_and_place(work, together, total_heads, sections):
    """Which head and which place in its order a number stands for.

    sections: pointer to the places where sections end. One comes after the other, each head by
    head, or for some heads `together`, as what these read is then in the L2 cache.
    """
    begin = gl.to_tensor(0)
    end = gl.load(sections)
    while work >= total_heads * end:
        begin = end
        sections += 1
        end = gl.load(sections)
    rest = work - total_heads * begin
    size = end - begin
    first = rest // (together * size) * together
    rest -= first * size
    together = gl.minimum(together, total_heads - first)
    return first + rest % together, begin + rest // together
