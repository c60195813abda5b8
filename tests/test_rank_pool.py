"""The pool itself: what it returns, what it reports, and when it trusts its ranks again."""

import functools
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from rank_pool import RankFailure, RankPool, RemoteError


@pytest.fixture(scope="module")
def small() -> Iterator[RankPool]:
    """A pool of our own to break, so that the shared one stays up."""
    with RankPool(3, grace=2.0) as pool:
        yield pool


@dataclass
class Pair:
    rank: int
    pid: int


class Unpicklable(Exception):
    def __init__(self, first: int, second: int):
        super().__init__(f"{first} and {second}")


def rank_and_pid(group: dist.ProcessGroup) -> Pair:
    return Pair(dist.get_rank(group), os.getpid())


def pids(pool: RankPool) -> list[int]:
    return [pair.pid for pair in pool.run(rank_and_pid, pool.size)]


def group_size(group: dist.ProcessGroup) -> tuple[int, int]:
    return dist.get_rank(group), dist.get_world_size(group)


def sum_of_ranks(group: dist.ProcessGroup) -> torch.Tensor:
    x = torch.tensor(dist.get_rank(group))
    dist.all_reduce(x, group=group)
    return x


def scaled(group: dist.ProcessGroup, x: torch.Tensor, *, by: torch.Tensor) -> dict:
    return {"y": x * by, "view": x[:, 1:], "rank": dist.get_rank(group)}


def draw(group: dist.ProcessGroup) -> torch.Tensor:
    return torch.randn(4)


def threads(group: dist.ProcessGroup) -> int:
    return torch.get_num_threads()


def raise_on(group: dist.ProcessGroup, *ranks: int) -> int:
    print(f"about to look at rank {dist.get_rank(group)}")
    if dist.get_rank(group) in ranks:
        raise ValueError(f"bad input on rank {dist.get_rank(group)}")
    return dist.get_rank(group)


def reduce_unless_rank_1_fails(group: dist.ProcessGroup) -> None:
    raise_on(group, 1)
    dist.barrier(group)


def stuck_on(group: dist.ProcessGroup, rank: int) -> None:
    if dist.get_rank(group) == rank:
        threading.Event().wait()


def die_on(group: dist.ProcessGroup, rank: int) -> None:
    if dist.get_rank(group) == rank:
        os._exit(7)


def raise_with_a_collective_begun_on_rank_0(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 0:
        dist.all_reduce(torch.ones(1), group=group, async_op=True)
    raise ValueError("late")


def raise_unpicklable(group: dist.ProcessGroup) -> None:
    raise Unpicklable(1, 2)


def leave(group: dist.ProcessGroup) -> None:
    raise SystemExit(3)


def return_unpicklable(group: dist.ProcessGroup) -> object:
    return lambda: None


def write_and_raise(group: dist.ProcessGroup) -> None:
    print("by print")
    os.write(1, b"to stdout\n")
    os.write(2, b"to stderr\n")
    raise ValueError("done")


@pytest.mark.parametrize("world_size", range(1, 9))
def test_a_collective_at_every_size(pool: RankPool, world_size: int) -> None:
    sums = pool.run(sum_of_ranks, world_size)
    assert [int(x) for x in sums] == [world_size * (world_size - 1) // 2] * world_size
    assert pool.run(group_size, world_size) == [(r, world_size) for r in range(world_size)]


def test_values_come_in_rank_order_from_one_set_of_processes(pool: RankPool) -> None:
    first, second = pool.run(rank_and_pid, 4), pool.run(rank_and_pid, 8)
    assert [pair.rank for pair in second] == list(range(8))
    assert len({pair.pid for pair in second} | {os.getpid()}) == 9
    assert first == second[:4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_travel_both_ways(pool: RankPool, dtype: torch.dtype) -> None:
    x = torch.arange(6).reshape(2, 3).to(dtype)
    for rank, got in enumerate(pool.run(scaled, 2, x, by=torch.tensor(3, dtype=dtype))):
        assert got["rank"] == rank
        torch.testing.assert_close(got["y"], x * 3, rtol=0, atol=0)
        torch.testing.assert_close(got["view"], x[:, 1:], rtol=0, atol=0)


def test_a_gradient_flag_survives(pool: RankPool) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert all(got["y"].requires_grad for got in pool.run(scaled, 2, x, by=torch.tensor(2.0)))


def test_partial_functions_run(pool: RankPool) -> None:
    got = pool.run(functools.partial(scaled, by=torch.tensor(2.0)), 1, torch.ones(1, 2))
    assert got[0]["y"].tolist() == [[2.0, 2.0]]


def test_every_case_starts_from_the_same_seed(pool: RankPool) -> None:
    draws = pool.run(draw, 2) + pool.run(draw, 2)
    assert all(torch.equal(x, draws[0]) for x in draws)


def test_ranks_use_one_thread(pool: RankPool) -> None:
    assert pool.run(threads, 8) == [1] * 8


def test_world_size_must_fit(pool: RankPool) -> None:
    with pytest.raises(ValueError, match="world_size=9 of a pool of 8 ranks"):
        pool.run(group_size, 9)


def test_a_function_without_a_name_is_refused_before_anything_is_sent(small: RankPool) -> None:
    before = pids(small)
    with pytest.raises(TypeError, match="top level of a module"):
        small.run(lambda group: None, 2)
    assert pids(small) == before


def test_one_failing_rank_fails_the_case_and_ends_the_pool(small: RankPool) -> None:
    before = pids(small)
    with pytest.raises(RankFailure, match="1 of 3 ranks failed in raise_on") as failure:
        small.run(raise_on, 3, 1)
    message = str(failure.value)
    assert "rank 1: Traceback" in message
    assert "ValueError: bad input on rank 1" in message
    assert "about to look at rank 1" in message, "what the rank printed belongs to the report"
    assert "ranks 0, 2: returned" in message
    assert list(failure.value.errors) == [1]
    assert isinstance(failure.value.errors[1], ValueError)
    assert not set(before) & set(pids(small))


def test_every_failing_rank_is_reported(small: RankPool) -> None:
    with pytest.raises(RankFailure, match="2 of 3 ranks failed") as failure:
        small.run(raise_on, 3, 0, 2)
    assert "bad input on rank 0" in str(failure.value)
    assert "bad input on rank 2" in str(failure.value)


def test_ranks_that_wait_for_a_failed_one_are_not_waited_for(small: RankPool) -> None:
    with pytest.raises(RankFailure) as failure:
        small.run(reduce_unless_rank_1_fails, 3, timeout=100)
    assert "bad input on rank 1" in str(failure.value)
    assert "rank 0: still busy 2 s after rank 1 had failed" in str(failure.value)
    assert isinstance(failure.value.errors[2], TimeoutError)
    assert [int(x) for x in small.run(sum_of_ranks, 3)] == [3] * 3


def test_timeout_names_the_silent_rank_and_where_it_was(small: RankPool) -> None:
    before = pids(small)
    with pytest.raises(RankFailure) as failure:
        small.run(stuck_on, 3, 2, timeout=2)
    message = str(failure.value)
    assert "rank 2: no answer within 2 s" in message
    assert re.search(r"test_rank_pool.py\", line \d+ in stuck_on", message)
    assert "ranks 0, 1: returned" in message
    assert not set(before) & set(pids(small))


def test_a_dead_rank_is_named(small: RankPool) -> None:
    with pytest.raises(RankFailure, match="rank 1: died with exit code 7") as failure:
        small.run(die_on, 3, 1)
    assert isinstance(failure.value.errors[1], ChildProcessError)
    assert [int(x) for x in small.run(sum_of_ranks, 3)] == [3] * 3


def test_a_rank_outside_the_case_that_died_is_replaced(small: RankPool) -> None:
    before = pids(small)
    os.kill(before[2], 9)
    small._ranks.processes[2].join()
    assert not set(before) & set(pids(small))


def test_errors_of_all_ranks_keep_the_pool(small: RankPool) -> None:
    before = pids(small)
    errors = small.errors(raise_on, 3, 0, 1, 2)
    assert [str(error) for error in errors] == [f"bad input on rank {r}" for r in range(3)]
    assert all(type(error) is ValueError for error in errors)
    assert "in raise_on" in str(errors[0].__cause__)
    assert len(small.errors(raise_on, 1, 0)) == 1
    assert pids(small) == before


def test_errors_wants_every_rank_to_raise(small: RankPool) -> None:
    with pytest.raises(RankFailure, match="not every one of 3 ranks raised") as failure:
        small.errors(raise_on, 3, 0, 1)
    assert "rank 2: returned" in str(failure.value)


def test_errors_does_not_count_a_timeout_as_raised(small: RankPool) -> None:
    with pytest.raises(RankFailure, match="rank 0: no answer within"):
        small.errors(stuck_on, 1, 0, timeout=2)


def test_ranks_out_of_step_are_not_used_again(small: RankPool) -> None:
    before = pids(small)
    assert len(small.errors(raise_with_a_collective_begun_on_rank_0, 3)) == 3
    assert not set(before) & set(pids(small))
    assert [int(x) for x in small.run(sum_of_ranks, 3)] == [3] * 3


def test_what_cannot_be_pickled_is_still_reported(small: RankPool) -> None:
    errors = small.errors(raise_unpicklable, 2)
    assert isinstance(errors[0], RemoteError)
    assert str(errors[0]) == "Unpicklable: 1 and 2"
    assert [error.code for error in small.errors(leave, 2)] == [3, 3]
    with pytest.raises(RankFailure, match="return_unpicklable"):
        small.run(return_unpicklable, 2)


def test_output_goes_to_the_report_of_its_own_case(small: RankPool) -> None:
    small.errors(raise_on, 3, 0, 1, 2)
    for error in small.errors(write_and_raise, 3):
        assert str(error.__cause__).endswith("\nby print\nto stdout\nto stderr\n")
        assert "about to look" not in str(error.__cause__)


def test_a_module_known_only_to_pytest_is_loaded_from_its_file(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "case.py"
    file.write_text("def double(group, x):\n    return 2 * x\n")
    spec = importlib.util.spec_from_file_location("no_such_package.case", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "no_such_package", ModuleType("no_such_package"))
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert pool.run(module.double, 2, 21) == [42, 42]


def test_an_interrupted_case_ends_its_ranks(
    small: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupt(BaseException):
        pass

    def interrupted(*args: object) -> list:
        raise Interrupt

    before = pids(small)
    monkeypatch.setattr(small._ranks, "_collect", interrupted)
    with pytest.raises(Interrupt):
        small.run(stuck_on, 3, 0)
    assert not set(before) & set(pids(small))


def test_stopping_ends_the_processes_and_their_files(small: RankPool) -> None:
    pids(small)
    ranks = small._ranks
    small.stop()
    small.stop()
    assert [process.exitcode for process in ranks.processes] == [0] * 3
    assert not ranks.directory.exists()
