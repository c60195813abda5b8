"""Plans of the next batches, made in a background thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, Generic, TypeVar

from ringflex.parallel.comm import communicator
from ringflex.parallel.draft import MaskFunction
from ringflex.parallel.in_order import finish_behind
from ringflex.parallel.machine import AttentionShape, Machine
from ringflex.parallel.planner import start_planning

_Batch = TypeVar("_Batch")


class _NoMoreBatches(ValueError):
    """How a source ends that did not fail."""


def _fail(error: Exception) -> Any:
    raise error


class PlanPrefetcher(Generic[_Batch]):
    """Batches with their plans; while one is trained on, the plan of the next is made.

    >>> masks_of = lambda batch: rf.causal() & rf.document(batch["doc_ids"])
    >>> for batch, plan in rf.PlanPrefetcher(loader, masks_of, seq_len=S, group=mesh["cp"]):
    ...     train_step(batch, plan)

    What masks capture is copied when a batch is taken from `batches`, and may be changed after; if
    it is on the CPU, nothing waits for a GPU. All ranks of the group must take the same number of
    batches, and make other plans meanwhile (`rf.plan`, a second prefetcher) in one order. An error
    of `batches`, `masks_of` or planning, on any rank, is raised on all where that batch would come;
    so it is on the others where one has no more batches.

    Args:
        batches: an iterable; each batch is taken `ahead` batches before it is yielded.
        masks_of: of a batch, what `rf.plan` takes as `mask_mod`: a mask, or a dict of them.
        group, seq_len, B, H, layout, strategy, block_size, machine, shape: as `rf.plan` takes them.
        ahead: plans under way or ready, at least 1.

    Attributes:
        seconds: what planning the batch that was yielded last has cost the calling thread.
    """

    def __init__(
        self,
        batches: Iterable[_Batch],
        masks_of: Callable[[_Batch], MaskFunction | Mapping[str, MaskFunction]],
        *,
        seq_len: int,
        group: Any = None,
        B: int | None = None,
        H: int | None = None,
        layout: Any = "auto",
        strategy: str = "auto",
        block_size: int = 128,
        machine: Machine | None = None,
        shape: AttentionShape | None = None,
        ahead: int = 1,
    ) -> None:
        if not isinstance(ahead, int) or isinstance(ahead, bool) or ahead < 1:
            raise ValueError(f"ahead must be a positive int, got {ahead!r}")
        self.batches, self.masks_of, self.ahead = batches, masks_of, ahead
        self.comm = communicator(group)
        self.request = {
            "seq_len": seq_len, "B": B, "H": H, "layout": layout, "strategy": strategy,
            "block_size": block_size, "machine": Machine() if machine is None else machine,
            "shape": shape,
        }  # fmt: skip
        self.seconds = 0.0

    def __iter__(self) -> Iterator[tuple[_Batch, Any]]:
        ready: deque[tuple[Any, Future[Any], float]] = deque()
        try:
            for batch, masks in self._batches():
                started = time.perf_counter()
                future = finish_behind(start_planning(masks, self.comm, self.request), self.comm)
                ready.append((batch, future, time.perf_counter() - started))
                if len(ready) > self.ahead:
                    yield self._next(ready)
        except _NoMoreBatches:
            return
        finally:
            # Where the loop is left early, too: the other ranks, which are as far, wait for this
            # one's part in the plans under way.
            wait([future for _, future, _ in ready])

    def _batches(self) -> Iterator[tuple[Any, Callable[[], Any]]]:
        """Each batch, and what makes its masks. Behind the last one, without end, is none: what
        makes its masks raises the error that the source ended with, so that the other ranks hear of
        it, with as many plans under way as they have."""
        source = iter(self.batches)
        try:
            for batch in source:
                yield batch, partial(self.masks_of, batch)
            end: Exception = _NoMoreBatches("there are no more batches")
        except Exception as error:
            end = error
        while True:
            yield None, partial(_fail, end)

    def _next(self, ready: deque[tuple[Any, Future[Any], float]]) -> tuple[_Batch, Any]:
        batch, future, spent = ready.popleft()
        started = time.perf_counter()
        plans = future.result()
        self.seconds = spent + time.perf_counter() - started
        return batch, plans
