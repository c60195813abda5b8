"""PlanPrefetcher: the plans of rf.plan, made in another thread."""

import threading
import time
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ringflex as rf
from parallel.test_planner import fingerprint
from rank_pool import RankPool
from ringflex.parallel.planner import Planning

S = 1000


def documents(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.sort(torch.randint(0, 9, (S,), generator=generator))[0]


def masks_of(ids: Tensor) -> dict[str, rf.MaskMod]:
    document = rf.document(ids)
    return {"local": document & rf.sliding_window(50), "global": rf.causal() & document}


def prefetched_on_rank(group: dist.ProcessGroup, ahead: int) -> list[list[int]]:
    """Each batch's plans are those that rf.plan makes, though the batch is changed meanwhile."""
    batches = [documents(i) for i in range(4)]
    expected = [rf.plan(masks_of(ids), S, group, layout="zigzag", block_size=16) for ids in batches]

    def reused() -> Iterator[Tensor]:
        buffer = torch.empty_like(batches[0])
        for ids in batches:
            yield buffer.copy_(ids)

    source = rf.PlanPrefetcher(
        reused(), masks_of, seq_len=S, group=group, layout="zigzag", block_size=16, ahead=ahead
    )
    count = 0
    for (_, plans), wanted in zip(source, expected, strict=True):
        assert plans.keys() == wanted.keys()
        for name, plan in plans.items():
            assert fingerprint(plan) == fingerprint(wanted[name])
        total = torch.ones(1)
        dist.all_reduce(total, group=group)  # the program's own, while plans are under way
        assert total == dist.get_world_size(group)
        count += 1
    return [count]


@pytest.mark.parametrize("ahead", [1, 3])
def test_plans_are_those_of_plan(pool: RankPool, ahead: int) -> None:
    assert pool.run(prefetched_on_rank, 3, ahead) == [[4]] * 3


def failing_on_rank(group: dist.ProcessGroup, raises: bool) -> str:
    """Rank 1 has no mask for the third batch."""
    seen = 0

    def masks(number: int) -> rf.MaskMod:
        bad = number == 2 and dist.get_rank(group) == 1
        if bad and raises:
            raise ValueError("no mask today")
        return None if bad else rf.document(documents(number))  # type: ignore[return-value]

    try:
        for _ in rf.PlanPrefetcher(range(5), masks, seq_len=S, group=group):
            seen += 1
    except (TypeError, ValueError) as error:
        return f"{seen} {error}"
    return "no error"


@pytest.mark.parametrize("raises", [False, True])
def test_an_error_is_raised_on_all_ranks_where_the_batch_would_come(
    pool: RankPool, raises: bool
) -> None:
    first, second = pool.run(failing_on_rank, 2, raises)
    assert first.startswith("2 rank 1 refused: ")
    assert second.startswith("2 ")
    assert "mask" in second


def ending_on_rank(group: dist.ProcessGroup, error: type[Exception] | None, ahead: int) -> str:
    """Rank 0's source ends, or fails, before the third batch; then both make another plan."""
    seen = 0

    def source() -> Iterator[Tensor]:
        for number in range(5):
            if number == 2 and dist.get_rank(group) == 0:
                if error is None:
                    return
                raise error("disk")
            yield documents(number)

    try:
        for _ in rf.PlanPrefetcher(source(), rf.document, seq_len=S, group=group, ahead=ahead):
            seen += 1
        found = "no error"
    except (KeyError, OSError, ValueError) as raised:
        found = f"{type(raised).__name__}: {raised}"
    rf.plan(rf.causal(), S, group)
    return f"{seen} {found}"


@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_an_error_of_the_source_is_raised_on_all_ranks(pool: RankPool, ahead: int) -> None:
    assert pool.run(ending_on_rank, 2, OSError, ahead) == [
        "2 OSError: disk",
        "2 ValueError: rank 0 refused: OSError: disk",
    ]


@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_ranks_with_more_batches_hear_of_it(pool: RankPool, ahead: int) -> None:
    assert pool.run(ending_on_rank, 2, None, ahead) == [
        "2 no error",
        "2 ValueError: rank 0 refused: there are no more batches",
    ]


def test_an_error_of_the_source_of_one_process() -> None:
    def source() -> Iterator[Tensor]:
        yield documents(0)
        raise KeyError("disk")

    prefetcher = iter(rf.PlanPrefetcher(source(), masks_of, seq_len=S))
    next(prefetcher)
    with pytest.raises(KeyError, match="disk"):
        next(prefetcher)


def leaving_on_rank(group: dist.ProcessGroup) -> bool:
    for _ in rf.PlanPrefetcher(
        range(9), lambda i: rf.document(documents(i)), seq_len=S, group=group
    ):
        break
    rf.plan(rf.causal(), S, group)  # the ranks are still as far as each other
    return True


def test_the_loop_may_be_left_early(pool: RankPool) -> None:
    assert pool.run(leaving_on_rank, 2) == [True] * 2


def interleaved_on_rank(group: dist.ProcessGroup, rounds: int) -> int:
    """A prefetcher to train on, one to evaluate on, and a plan now and then; ranks are not in step,
    and masks differ in what they tell."""
    random, right = np.random.default_rng(dist.get_rank(group)), 0
    make = lambda block_size, first: iter(
        rf.PlanPrefetcher(
            [documents(first + i) for i in range(rounds)], rf.document, seq_len=S, group=group,
            block_size=block_size,
        )
    )  # fmt: skip
    train, evaluate = make(16, 0), make(32, 100)
    for number in range(rounds):
        ids, plan = next(train)
        time.sleep(random.random() * 0.02)
        right += plan.layout.block_size == 16 and torch.equal(ids, documents(number))
        right += next(evaluate)[1].layout.block_size == 32
        other = rf.plan(rf.causal() & rf.document(documents(200 + number)), S, group, block_size=64)
        right += other.layout.block_size == 64
    return right


def test_plans_of_several_kinds_come_in_the_order_of_the_program(pool: RankPool) -> None:
    assert pool.run(interleaved_on_rank, 3, 20) == [60] * 3


def test_plans_are_made_in_another_thread_while_a_batch_is_used() -> None:
    threads: list[int] = []
    made = threading.Event()
    finish = Planning.finish

    def recorded(self: Planning) -> object:
        threads.append(threading.get_ident())
        plans = finish(self)
        if len(threads) > 1:
            made.set()
        return plans

    with patch.object(Planning, "finish", recorded):
        source = iter(rf.PlanPrefetcher([documents(0), documents(1)], masks_of, seq_len=S))
        next(source)
        assert made.wait(timeout=60)  # the second, without being asked for
        next(source)
    assert threading.get_ident() not in threads


def test_what_planning_costs_the_calling_thread_is_told() -> None:
    source = rf.PlanPrefetcher([documents(0)], masks_of, seq_len=S)
    assert source.seconds == 0
    list(source)
    assert 0 < source.seconds < 60


@pytest.mark.parametrize("ahead", [0, -1, True, 1.5])
def test_ahead_is_checked(ahead: object) -> None:
    with pytest.raises(ValueError, match="ahead must be a positive int"):
        rf.PlanPrefetcher([], masks_of, seq_len=S, ahead=ahead)  # type: ignore[arg-type]
