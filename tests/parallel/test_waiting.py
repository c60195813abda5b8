"""Queries that wait: each sees in one launch what it saw in two, and enough is left meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import ringflex as rf
from mask_zoo import MASKS, MaskCase
from ringflex.kernels import eager, triton_kernel
from ringflex.kernels.stages import ACTIVE, BEGINS, ENDS
from ringflex.parallel import waiting
from ringflex.parallel.plan import Plan
from ringflex.parallel.waiting import Launch, launches
from ringflex.reference import reference_attention_with_gradients
from simulated_ranks import run_ranks

S, BLOCK = 200, 16


@contextmanager
def hiding(hidden: float = 0.0) -> Iterator[None]:
    """0: all that can wait."""
    with mock.patch.object(waiting, "_HIDDEN", hidden):
        yield


def plans(case: MaskCase, world_size: int, strategy: str, **options: Any) -> list[Plan]:
    B, H = 2 if case.needs_b else None, 4 if case.needs_h else None
    return rf.plan_all(
        case.make(S, 2, 4), S, world_size, B=B, H=H, strategy=strategy, block_size=BLOCK, **options
    )


def seen(launch: Launch | Any) -> set[tuple[int, ...]]:
    """`(batch element, head, query block, global position of the K/V block, state)`."""
    if launch.mask is None:
        return set()
    states = launch.mask.block_map()
    starts = np.broadcast_to(launch.mask.kv_starts, (launch.mask.B, launch.mask.kv_blocks))
    return {
        (int(b), int(h), int(q), int(starts[b, kv]), int(states[b, h, q, kv]))
        for b, h, q, kv in zip(*np.nonzero(states), strict=True)
    }


@pytest.mark.parametrize("strategy", ["direct", "ring", "all_gather"])
@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_the_same_blocks_in_fewer_launches(case: MaskCase, strategy: str) -> None:
    for world_size in (2, 3):
        for plan in plans(case, world_size, strategy):
            with hiding():
                steps, apart, merge = launches(plan, True)
            assert merge == any(launch.merges for launch in steps)
            found = [*steps, *apart]
            assert set().union(*map(seen, found)) == set().union(*map(seen, plan.steps))
            assert sum(map(len, map(seen, found))) == sum(map(len, map(seen, plan.steps)))
            if plan.steps[0].stage is None:
                continue
            turns = np.stack([x.stage.turns for x in found if x.stage is not None])
            assert ((turns & BEGINS != 0).sum(axis=0) == 1).all()
            assert ((turns & ENDS != 0).sum(axis=0) == 1).all()
            before = np.stack([s.stage.turns for s in plan.steps if s.stage is not None])
            one_other = (before[0] & ACTIVE != 0) & ((before & ACTIVE != 0).sum(axis=0) == 2)
            assert ((turns & ACTIVE != 0).sum(axis=0)[one_other] == 1).all()


def test_enough_is_left() -> None:
    for plan in rf.plan_all(rf.causal(), 65_536, 2):
        steps, (apart, _), _ = launches(plan, True)
        first, rest = plan.steps[0].mask, [x.mask for x in (steps[0], apart) if x.mask is not None]
        assert first is not None and rest
        exchanged = plan.steps[1].receives, plan.steps[1].sends  # unequal, on either rank
        longest = max(sum(t.count for t in way) for way in exchanged)
        least = waiting._HIDDEN * plan.outline.reads.costs.near * longest
        left = sum(mask.visible_blocks for mask in rest)
        assert least <= left < first.visible_blocks / 2


def test_long_steps_leave_what_costs_nothing() -> None:
    """More than hides the transfer: what is apart, if there is enough, as on the first rank; or
    else merging that takes 0.2% of the local step, no more."""
    for plan in rf.plan_all(rf.causal(), 524_288, 2):
        steps, (apart, _), _ = launches(plan, True)
        first, merged = plan.steps[0].mask, steps[0].stage
        left = sum(x.mask.visible_blocks for x in (steps[0], apart) if x.mask is not None)
        arriving = sum(t.count for t in plan.steps[1].receives)
        assert left > 10 * waiting._HIDDEN * plan.outline.reads.costs.near * arriving
        assert (apart.mask is not None) is (merged is None) is (plan.rank == 0)
        if merged is not None:
            assert first is not None
            rows = (merged.turns & ENDS == 0) & (merged.turns & ACTIVE != 0)
            assert 0 < waiting._MERGE * rows.sum() <= 0.002 * first.visible_blocks


@pytest.mark.parametrize("at_once", [1.0, 4.125, 7.0, 1e6])
def test_as_many_as_run_at_once(at_once: float) -> None:
    """Of the second rank, whose rows all see the first's K/V: none are computed early, or as many
    as take as long as those that hide the transfer. The last step merges with these only."""
    plan = rf.plan_all(rf.causal(), 65_536, 2)[1]
    least = launches(plan, True).steps[0].stage
    steps, (_, last), merge = launches(plan, True, at_once)
    early = steps[0].stage
    assert least is not None and early is not None and merge
    needed, rows = (np.count_nonzero(stage.turns) for stage in (least, early))
    assert rows == min(early.turns.size, int(np.ceil(needed / at_once) * at_once))
    merged, whole = steps[-1].stage, last.stage
    assert merged is not None and (merged.turns[early.turns != 0] == ENDS | ACTIVE).all()
    assert np.count_nonzero(merged.turns) == rows
    if at_once == 1e6:
        assert whole is None
        return
    assert whole is not None and whole.is_selection and last.more
    assert ((whole.turns != 0) == (merged.turns == 0)).all()


def test_kernels_that_cannot() -> None:
    for plan in rf.plan_all(rf.causal(), 1024, 2):
        steps, (apart, last), _ = launches(plan, False)
        assert last.mask is None
        for launch, step in zip(steps[1:], plan.steps[1:], strict=True):
            assert launch.mask is step.mask and launch.stage is step.stage and not launch.more
        assert seen(steps[0]) | seen(apart) == seen(plan.steps[0])
        assert not seen(steps[0]) & seen(apart)
        assert apart.stage is None or not apart.merges


def test_nothing_merges_where_all_wait() -> None:
    """With a window that reaches into one neighbour."""
    made = rf.plan_all(rf.sliding_window(40), 512, 4, block_size=16, layout="contiguous")
    for plan in made[1:]:
        assert any(Launch(s.mask, s.stage).merges for s in plan.steps)
        with hiding():
            found = launches(plan, True)
            assert not found.merge and not any(launch.merges for launch in found.steps)


@pytest.mark.parametrize(
    ("name", "kernel", "strategy", "sinks", "hidden"),
    [
        ("causal", eager, "direct", True, 0.0),
        ("causal", eager, "ring", False, 0.02),
        ("sliding window", eager, "direct", True, 0.0),
        ("documents", eager, "ring", False, 0.0),
        ("documents", triton_kernel, "direct", True, 0.0),
    ],
)
def test_results(name: str, kernel: ModuleType, strategy: str, sinks: bool, hidden: float) -> None:
    torch.manual_seed(0)
    ids = torch.sort(torch.randint(0, 4, (2, S)))[0]
    masks: dict[str, Callable[..., torch.Tensor]] = {
        "causal": rf.causal(),
        "sliding window": rf.causal() & rf.sliding_window(50),
        "documents": rf.causal() & rf.document(ids),
    }
    q, k, v, dout = (torch.randn(2, h, S, 16) for h in (4, 2, 2, 4))
    sink = torch.randn(4) if sinks else None
    made = rf.plan_all(masks[name], S, 2, B=2, H=4, strategy=strategy, block_size=BLOCK)
    with hiding(hidden), mock.patch.object(triton_kernel, "joins", True):
        assert any(launch.more for plan in made for launch in launches(plan, True).steps)
        found = run_ranks(made, kernel, q, k, v, dout, sinks=sink)
    exact = reference_attention_with_gradients(
        *(x.double() for x in (q, k, v, dout)),
        mask_mod=masks[name],
        sinks=None if sink is None else sink.double(),
    )
    wanted = (exact.out, exact.lse, exact.dq, exact.dk, exact.dv)
    for got, want in zip(found[:5], wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
