"""In which exchange each two ranks, or nodes, exchange blocks. Pure; the same on every rank."""

from __future__ import annotations

import numpy as np

from ringflex.masks.runs import Array


def rounds(loads: Array, room: int) -> Array:
    """The round of each transfer, from 1 on, int64 `[n, n]`; 0 where there is none.

    Nearest first, each takes the first round in which its reader receives no more than `room` in
    all, and its source sends no more than twice that. So ranks that read little, or of few others,
    are done in few rounds, wherever around the ring those others are, and nobody waits in a round
    for one that gets another's share.

    Args:
        loads: int64 `[readers, sources, parts]`, blocks; parts have links and room of their own,
            such as the GPUs of a node. One transfer alone may exceed the room.
    """
    n = loads.shape[0]
    found = np.zeros((n, n), dtype=np.int64)
    reader = np.arange(n)
    left = np.count_nonzero(loads.any(axis=2), axis=1)  # transfers of a reader without a round
    # Of each round that a reader with transfers left has room in, and of an empty one after them.
    came, gone = (np.zeros((1, n, loads.shape[2]), dtype=np.int64) for _ in range(2))
    before = 0  # rounds that are full
    for distance in range(1, n):
        source = (reader - distance) % n
        load = loads[reader, source]
        busy = load.any(axis=1)
        if not busy.any():
            continue
        r, s, load = reader[busy], source[busy], load[busy]
        fits = ((came[:, r] + load <= room) & (gone[:, s] + load <= 2 * room)).all(axis=2)
        fits[-1] = True
        chosen = np.argmax(fits, axis=0)
        came[chosen, r] += load
        gone[chosen, s] += load
        found[r, s] = before + chosen + 1
        left[r] -= 1
        open_ = ((came < room).all(axis=2) & (left > 0)).any(axis=1)
        full = int(np.argmax(open_)) if open_.any() else open_.size
        empty = np.zeros((int(full == open_.size or came[-1].any()), *came.shape[1:]), np.int64)
        came, gone = (np.concatenate([x[full:], empty]) for x in (came, gone))
        before += full
    return found
