"""How slow this machine is just now, so that limits on time hold on a slow or a busy one, too."""

import time

import numpy as np

SECONDS = 0.08  # of `_work` on one core of an AMD EPYC at 2.4 GHz, whose seconds limits are in


def slowness() -> float:
    """Processor time of a fixed piece of work over what it takes there; at least 1."""
    start = time.process_time()
    _work()
    return max(1.0, (time.process_time() - start) / SECONDS)


def _work() -> None:
    """What planning does: rows of large arrays compared, and many calls on small ones."""
    rows = np.random.default_rng(0).integers(0, 2048, 192)
    table = np.arange(2048 * 2048, dtype=np.int16).reshape(2048, 2048)
    for _ in range(40):
        np.count_nonzero(table.take(rows, axis=0) > table.take(rows[::-1], axis=0), axis=1)
    small = np.arange(64)
    for i in range(12_000):
        np.flatnonzero(np.append(small, i) > i)
